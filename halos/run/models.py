"""The models of a run: policy or reward model, adapter, reference."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halos.checkpoint.weights import load_value_head, saved_model
from halos.config.schema import Config
from halos.confined import expanded
from halos.distributed.strategy import Strategy
from halos.errors import UserError
from halos.logps.initial_values import remember_initial_values
from halos.logps.model import ActorCritic, LanguageModel, ModelWithHead, RewardModel
from halos.logps.vocabulary import Vocabulary
from halos.models import adapter
from halos.models.load import attention, freeze, load_model, refuse_different_tokenizer, weights_dtype
from halos.models.locate import locate
from halos.types import LossInput

log = logging.getLogger(__name__)


class Machine(Protocol):
    """What models are loaded for: an Accelerator, or what stands for one where nothing is trained."""

    @property
    def device(self) -> torch.device: ...

    @property
    def mixed_precision(self) -> str: ...

    @property
    def is_main_process(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where models are taken from, and what they are loaded for."""

    config: Config
    base: Path
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary  # with the tokens that the base does not know
    stops: Sequence[int]  # the tokens that end an assistant's turn
    made: Machine
    engine: type[Strategy]  # that will hold them

    @property
    def half(self) -> bool:
        """Whether this run computes in bfloat16 on a GPU, so that frozen weights lose nothing by it."""
        return self.made.device.type == "cuda" and self.made.mixed_precision == "bf16"

    def load(
        self, source: Path, dtype: torch.dtype, *, reward: bool, quantize: str | None = None, hollow: bool = False
    ) -> PreTrainedModel:
        """On the first process, or where each has a model of its own, with its weights; unless it is to be `hollow`."""
        hollow = hollow or (self.engine.is_sharded and not self.made.is_main_process)
        return self._load(source, dtype, reward=reward, quantize=quantize, hollow=hollow)

    def draw(self, source: Path, dtype: torch.dtype, *, reward: bool) -> PreTrainedModel:
        """The same without a weight, on the meta device."""
        with torch.device("meta"):
            return self._load(source, dtype, reward=reward, quantize=None, hollow=True)

    def _load(
        self, source: Path, dtype: torch.dtype, *, reward: bool, quantize: str | None, hollow: bool
    ) -> PreTrainedModel:  # fmt: skip
        settings, device = self.config.model, self.made.device
        half = dtype is torch.bfloat16 or self.made.mixed_precision == "bf16"
        return load_model(
            source,
            self.tokenizer,
            reward=reward,
            dtype=dtype,
            attention=attention(settings.attention, half=half, device=device),
            quantize=quantize,
            new_tokens=self.vocabulary.new if source == self.base else (),
            stops=self.stops,
            seed=self.config.seed,
            on_meta=hollow,
            longest=self.config.train.max_length,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the policy's weights, or of its frozen base's."""
        return weights_dtype(self.config.model.dtype, trained=self.config.peft.name == "none", half=self.half)

    @property
    def reference_dtype(self) -> torch.dtype:
        return weights_dtype(self.config.model.dtype, trained=True, half=self.half)


def refers_to_adapter(config: Config) -> bool:
    """Whether a loss that compares with a reference has it under the adapter that the run begins with: the policy's own start."""
    named, start = config.reference.name_or_path, config.peft.init_from
    return config.peft.name == "lora" and start is not None and named is None and config.reference.adapter == "start"


def policy(shelf: Shelf, *, reward: bool, refers: bool, checkpoint: Path | None) -> nn.Module:
    """The model to train, with its adapter; from `checkpoint`'s weights where a run is resumed. `refers`: the loss compares with
    a reference."""
    config = shelf.config
    remembers = refers and refers_to_adapter(config)
    lora = config.peft.name == "lora"
    dtype = shelf.dtype
    source, sharded = saved_model(checkpoint) if checkpoint and not lora else (shelf.base, False)
    model = shelf.load(source, dtype, reward=reward, quantize=config.model.quantize, hollow=sharded)
    if config.model.quantize:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.train.activation_checkpointing)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not lora:
        return model
    adapted = adapter.attach(model, asdict(config.peft), base=str(shelf.base), reward=reward, seed=config.seed)
    if config.peft.init_from is not None and (remembers or not checkpoint):
        adapter.load_adapter(adapted, Path(config.peft.init_from))
    if remembers:
        remember_initial_values(adapted)
    if checkpoint:
        adapter.load_adapter(adapted, checkpoint / "adapter")
    return adapted


def structure(shelf: Shelf, *, reward: bool) -> nn.Module:
    """The policy with its adapter and without its weights, on the meta device. Raises UserError where `policy` would, but for
    what only the weights show."""
    config = shelf.config
    if config.model.quantize and not shelf.engine.supports_quantised:
        raise UserError(f"model.quantize={config.model.quantize}: a quantised base cannot be sharded; launch with a DDP config")
    model = shelf.draw(shelf.base, shelf.dtype, reward=reward)
    if config.peft.name == "none":
        return model.eval()
    adapted = adapter.attach(model, asdict(config.peft), base=str(shelf.base), reward=reward, seed=config.seed)
    if config.peft.init_from is not None and not config.resume:
        adapter.refuse_different_settings(adapted, Path(config.peft.init_from))
        adapter.refuse_different_tensors(adapted, Path(config.peft.init_from))
    return adapted.eval()


def structure_of_reference(shelf: Shelf, named: Path) -> nn.Module:
    """The reference that the config names, without its weights."""
    return shelf.draw(named, shelf.reference_dtype, reward=False)


def named_reference(shelf: Shelf) -> Path | None:
    """Where the reference lies that the config names. Raises UserError for one that cannot be compared with the policy."""
    config = shelf.config
    if config.reference.name_or_path is None:
        return None
    cache = expanded(config.cache_dir)
    place = locate(config.reference.name_or_path, config.reference.revision, cache, key="reference.name_or_path")
    refuse_different_tokenizer(place, shelf.tokenizer, shelf.vocabulary.new)
    return place


def reference(shelf: Shelf, model: nn.Module, named: Path | None) -> ModelWithHead | None:
    """A frozen copy of the policy's start, or the model at `named`.

    None where the policy itself, with what is trained of it as it was at the start, is the reference: no second copy is loaded.
    """
    if named is None and isinstance(model, PeftModel):
        return None
    inner = shelf.load(named or shelf.base, shelf.reference_dtype, reward=False)
    return freeze(LanguageModel(inner, temperature=shelf.config.train.temperature))


def wrapped(shelf: Shelf, model: nn.Module, inputs: type[LossInput], checkpoint: Path | None) -> ModelWithHead:
    """What is trained: the model under what a loss of these inputs looks at. A value head goes on from one that was saved."""
    if inputs.head == "score":
        return RewardModel(model)
    temperature = shelf.config.train.temperature
    if inputs.head == "language":
        return LanguageModel(model, temperature=temperature)
    made = ActorCritic(model, temperature=temperature)
    adapter = shelf.config.peft.init_from
    beside = [Path(adapter), Path(adapter).parent] if adapter else []  # of an adapter that was exported, or lies in a save
    for place in (checkpoint,) if checkpoint else (*beside, shelf.base):
        if load_value_head(place, made.value_head):
            log.info("%-10s from %s", "value head", place)
            break
    return made
