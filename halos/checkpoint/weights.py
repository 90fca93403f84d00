"""Weights on their way to disk: a model directory for from_pretrained, or PEFT's adapter directory."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from halos.distributed.deepspeed import Zero
from halos.errors import UserError, doing
from halos.logps.vocabulary import Vocabulary

VALUE_HEAD = "value_head"  # beside model/ and adapter/, and in FINAL
HEAD_FILE = "model.safetensors"  # in it
HEAD = "value_head."  # how its tensors are called in the module that is trained


def gathered(module: nn.Module, *, trained_only: bool, offload: bool = True) -> dict[str, Tensor]:
    """Whole tensors of the wrapped module under the names of the model inside; every process calls, the first one gets.

    Without `offload` every process gets them where they lie; a module that is not sharded gives its own, not copies.
    """
    if isinstance(module, Zero):
        if module.stage == 3:
            return _named(module.gathered(trained_only=trained_only, offload=offload))
        module = module.module  # the same on every process
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload, ignore_frozen_params=trained_only)
    state = get_model_state_dict(module, options=options)
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in state and first.setdefault(id(parameter), name) != name:
            state[name] = state[first[id(parameter)]]  # tied parameters that were gathered twice are written once
    return _named(state)


def _named(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value for name, value in state.items() if isinstance(value, Tensor)}


def is_sharded(module: nn.Module) -> bool:
    """Whether no process has all of its parameters, so that a forward pass needs all processes."""
    return isinstance(module, FSDPModule) or (isinstance(module, Zero) and module.stage == 3)


def save_weights(directory: Path, model: nn.Module, state: dict[str, Tensor], vocabulary: Vocabulary) -> None:
    """`directory`/adapter for a PEFT model, with the `vocabulary` that its base was given, else `directory`/model; `state` as
    it was gathered."""
    state = apart(directory, state)
    if isinstance(model, PeftModel):
        path = directory / "adapter"
        model.save_pretrained(str(path), state_dict=state, save_embedding_layers=False)
        (path / "README.md").unlink(missing_ok=True)  # PEFT's empty form
        vocabulary.save(path)
        inner = model.get_base_model()
        if isinstance(inner, PreTrainedModel) and inner.can_generate() and inner.generation_config is not None:
            inner.generation_config.save_pretrained(directory)
        return
    assert isinstance(model, PreTrainedModel)
    save_model(directory / "model", model, state)


def apart(directory: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of `state` is the model's; a value head goes into a directory of its own, where from_pretrained never looks."""
    head = {name.removeprefix(HEAD): value for name, value in state.items() if name.startswith(HEAD)}
    if head:
        (directory / VALUE_HEAD).mkdir()
        save_file({name: value.contiguous() for name, value in head.items()}, directory / VALUE_HEAD / HEAD_FILE)
    return {name: value for name, value in state.items() if not name.startswith(HEAD)}


def load_value_head(directory: Path, head: nn.Module) -> bool:
    """Whether a value head lies beside the model or checkpoint in `directory`. Raises UserError for one of another model."""
    path = directory / VALUE_HEAD / HEAD_FILE
    if not path.is_file():
        return False
    with doing(f"{path} cannot be read"):
        weights = load_file(path)
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} is no value head of this model: {str(error).splitlines()[-1].strip()}") from error
    return True


def save_model(path: Path, model: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """What from_pretrained loads, with the attention that any reader has, not the one training used."""
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model.save_pretrained(str(path), state_dict=state)
