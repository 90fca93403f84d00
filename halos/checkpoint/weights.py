"""Weights on their way to disk: a model directory for from_pretrained, or PEFT's adapter directory."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from halos.errors import UserError, doing
from halos.logps.vocabulary import Vocabulary

VALUE_HEAD = "value_head"  # beside model/ and adapter/, and in FINAL
HEAD_FILE = "model.safetensors"  # in it
HEAD = "value_head."  # how its tensors are called in the module that is trained


def save_weights(directory: Path, model: nn.Module, state: dict[str, Tensor], vocabulary: Vocabulary) -> None:
    """`directory`/adapter for a PEFT model, with the `vocabulary` that its base was given, else `directory`/model; `state` as
    a strategy gathered it."""
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
