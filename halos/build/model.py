"""The models of a run: policy or reward model, adapter, reference, optimizer."""

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halos.config.schema import Config, Optim
from halos.logps.model import LanguageModel, RewardModel
from halos.models import adapter
from halos.models.load import attention, freeze, load_model, weights_dtype
from halos.models.locate import locate


def policy(
    config: Config, base: Path, tokenizer: PreTrainedTokenizerBase, made: Accelerator, *, reward: bool, checkpoint: Path | None
) -> nn.Module:
    """The model to train, with its adapter; from `checkpoint`'s weights where a run is resumed."""
    lora = config.peft.name == "lora"
    dtype = weights_dtype(config.model.dtype, trained=not lora, device=made.device)
    source = checkpoint / "model" if checkpoint and not lora else base
    model = _load(config, source, tokenizer, made, reward=reward, dtype=dtype, quantize=config.model.quantize)
    if config.model.quantize:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.train.activation_checkpointing)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not lora:
        return model
    adapted = adapter.attach(model, asdict(config.peft), base=str(base), reward=reward, seed=config.seed)
    if checkpoint:
        adapter.load_adapter(adapted, checkpoint / "adapter")
    return adapted


def _load(
    config: Config,
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    made: Accelerator,
    *,
    reward: bool,
    dtype: torch.dtype,
    quantize: str | None = None,
) -> PreTrainedModel:
    half = dtype is torch.bfloat16 or made.mixed_precision == "bf16"
    return load_model(
        source,
        tokenizer,
        reward=reward,
        dtype=dtype,
        attention=attention(config.model.attention, half=half, device=made.device),
        quantize=quantize,
        new_tokens=config.model.add_tokens,
        seed=config.seed,
    )


def reference(
    config: Config, model: nn.Module, base: Path, tokenizer: PreTrainedTokenizerBase, made: Accelerator
) -> nn.Module | None:
    """A frozen copy of the policy's start, or the model that `reference.name_or_path` names.

    None where the policy's own base, with its adapter off, is the reference: no second copy is loaded.
    """
    named = config.reference.name_or_path
    if named is None and isinstance(model, PeftModel):
        return None
    source = base if named is None else locate(named, config.reference.revision, Path(config.cache_dir).expanduser())
    dtype = weights_dtype(config.model.dtype, trained=True, device=made.device)
    loaded = _load(config, source, tokenizer, made, reward=False, dtype=dtype)
    return freeze(LanguageModel(loaded)).to(made.device)


def wrapped(model: nn.Module, *, reward: bool) -> nn.Module:
    return RewardModel(model) if reward else LanguageModel(model)


def optimizer(module: nn.Module, settings: Optim) -> Optimizer:
    """Over the parameters that are trained; norms and biases are not decayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    first, second = settings.betas
    if settings.name == "adamw":
        return AdamW(groups, lr=settings.lr, betas=(first, second), eps=settings.eps)
    if settings.name == "adam":
        return Adam(groups, lr=settings.lr, betas=(first, second), eps=settings.eps)
    if settings.name == "rmsprop":
        return RMSprop(groups, lr=settings.lr, eps=settings.eps)
    return SGD(groups, lr=settings.lr)
