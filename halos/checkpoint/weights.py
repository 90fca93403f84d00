"""Weights on their way to disk: a model directory for from_pretrained, or PEFT's adapter directory."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel


def gathered(module: nn.Module, *, trained_only: bool, offload: bool = True) -> dict[str, Tensor]:
    """Whole tensors of the wrapped module under the names of the model inside; every process calls, the first one gets.

    Without `offload` every process gets them where they lie; a module that is not sharded gives its own, not copies.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload, ignore_frozen_params=trained_only)
    state = get_model_state_dict(module, options=options)
    return {name.removeprefix("model."): value for name, value in state.items() if isinstance(value, Tensor)}


def save_weights(directory: Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    """`directory`/adapter for a PEFT model, else `directory`/model; `state` as it was gathered."""
    if isinstance(model, PeftModel):
        path = directory / "adapter"
        model.save_pretrained(str(path), state_dict=state, save_embedding_layers=False)
        (path / "README.md").unlink(missing_ok=True)  # PEFT's empty form
        return
    assert isinstance(model, PreTrainedModel)
    save_model(directory / "model", model, state)


def save_model(path: Path, model: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """What from_pretrained loads, with the attention that any reader has, not the one training used."""
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model.save_pretrained(str(path), state_dict=state)
