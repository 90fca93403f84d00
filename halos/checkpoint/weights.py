"""Save weights as a model for from_pretrained, as PEFT's adapter, or as shards; load shards and value heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from halos.checkpoint import sharded
from halos.checkpoint.select import SHARDED
from halos.distributed.parameters import shape_of
from halos.errors import UserError, user_errors
from halos.logps.model import bare
from halos.logps.vocabulary import Vocabulary

if TYPE_CHECKING:  # it imports accelerate, which the export command can do without
    from halos.distributed.strategy import Strategy

VALUE_HEAD = "value_head"  # a directory next to model/ and adapter/, and in FINAL
HEAD_FILE = "model.safetensors"  # in that directory
HEAD = "value_head."  # prefix of its tensors' names in the trained module


def save_shards(
    directory: Path, model: nn.Module, shards: Mapping[str, Tensor], group: dist.ProcessGroup | None, *, main: bool
) -> None:
    """Write `directory`/model-sharded: each rank of `group` its `shards` of a model that is trained in full, value head
    included; rank 0 the model's settings."""
    sharded.write(directory / SHARDED, shards, group)
    if main:
        inner = bare(model)
        inner.config.dtype, inner.config.architectures = str(inner.dtype).removeprefix("torch."), [type(inner).__name__]
        inner.config.save_pretrained(directory / SHARDED)
        if inner.can_generate() and inner.generation_config is not None:
            inner.generation_config.save_pretrained(directory / SHARDED)


def saved_model(checkpoint: Path) -> tuple[Path, bool]:
    """Return the directory of a checkpoint's full model, and whether it is sharded."""
    sharded_model = checkpoint / SHARDED
    return (sharded_model, True) if sharded_model.is_dir() else (checkpoint / "model", False)


def load_shards(directory: Path, strategy: Strategy, module: nn.Module) -> None:
    """Load the sharded model in `directory` into a module without weights. Raises UserError where it is another model's."""
    shapes = sharded.shapes(directory)

    def read(tensors: dict[str, Tensor]) -> None:
        if other := [name for name, value in tensors.items() if name not in shapes or shapes[name][0] != shape_of(value)]:
            raise UserError(f"{directory} is not the model of this run: it holds no {other[0]} of this shape")
        sharded.read(directory, tensors)

    with user_errors(f"{directory} cannot be read"):
        strategy.load_weights(module, read)


def save_weights(directory: Path, model: nn.Module, state: dict[str, Tensor], vocabulary: Vocabulary) -> None:
    """Write `directory`/adapter for a PEFT model, with the `vocabulary` that its base was grown to, else `directory`/model.
    `state`: as a strategy gathered it."""
    state = split_value_head(directory, state)
    if isinstance(model, PeftModel):
        path = directory / "adapter"
        save_adapter(path, model, state)
        vocabulary.save(path)
        inner = model.get_base_model()
        if isinstance(inner, PreTrainedModel) and inner.can_generate() and inner.generation_config is not None:
            inner.generation_config.save_pretrained(directory)
        return
    assert isinstance(model, PreTrainedModel)
    save_model(directory / "model", model, state)


def save_adapter(path: Path, model: PeftModel, state: dict[str, Tensor] | None = None) -> None:
    """Write PEFT's files, without the empty template of a model card, which takes most of the time of a small adapter."""
    vars(model)["create_or_update_model_card"] = lambda directory: None
    try:
        model.save_pretrained(str(path), state_dict=state, save_embedding_layers=False)
    finally:
        del vars(model)["create_or_update_model_card"]


def split_value_head(directory: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's part of `state`. A value head is written to a directory of its own, which from_pretrained ignores."""
    head = {name.removeprefix(HEAD): value for name, value in state.items() if name.startswith(HEAD)}
    if head:
        (directory / VALUE_HEAD).mkdir()
        save_file({name: value.contiguous() for name, value in head.items()}, directory / VALUE_HEAD / HEAD_FILE)
    return {name: value for name, value in state.items() if not name.startswith(HEAD)}


def load_value_head(directory: Path, head: nn.Module) -> bool:
    """Load the value head of the model or checkpoint in `directory`; return whether there is one. Raises UserError for another
    model's."""
    path = directory / VALUE_HEAD / HEAD_FILE
    if not path.is_file():
        return False
    with user_errors(f"{path} cannot be read"):
        weights = load_file(path)
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} is no value head of this model: {str(error).splitlines()[-1].strip()}") from error
    return True


def save_model(path: Path, model: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write what from_pretrained loads; config.json does not name training's attention implementation."""
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model.save_pretrained(str(path), state_dict=state)
