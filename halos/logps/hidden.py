"""A backbone's hidden states: over rows packed end to end, or over one row after the other."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from halos.logps.attention import SEGMENTS
from halos.types import Sequences

PACKS = (SEGMENTS, "flash_attention_2")  # what is told where rows end; every other attention takes one row at a time


def name_of_backbone(model: PreTrainedModel) -> str | None:
    """The part under the head: its name within the model, where it is one part."""
    if isinstance(model._modules.get(model.base_model_prefix), nn.Module):
        return model.base_model_prefix
    inner = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else None


def backbone_of(model: PreTrainedModel) -> nn.Module | None:
    name = name_of_backbone(model)
    return None if name is None else model._modules[name]


def is_packed(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation in PACKS


def hidden_states(model: PreTrainedModel, batch: Sequences, *, everywhere: bool = False) -> Tensor:
    """The last ones of all tokens: (tokens, hidden). Nothing of a row reaches another.

    `everywhere`: every process calls the layers equally often, as sharded ones must.
    """
    backbone = backbone_of(model)
    assert backbone is not None, f"{type(model).__name__} has no backbone: its plan is to be called as a whole"
    if is_packed(model):
        return _packed(backbone, str(model.config._attn_implementation), batch)
    rows = batch.ids.split(batch.lengths)
    more = most_rows(batch) - len(rows) if everywhere else 0  # before the layers, whose own collectives must not cross this one
    flat = torch.cat([_of_row(backbone, row) for row in rows])
    with _keeping_step():
        for _ in range(more):
            flat = flat + 0.0 * _of_row(backbone, rows[0]).sum()
    return flat


_only_in_step = False


@contextmanager
def _keeping_step() -> Iterator[None]:
    global _only_in_step
    _only_in_step = True
    try:
        yield
    finally:
        _only_in_step = False


def counts() -> bool:
    """Whether the row that goes through the layers is one of the batch; the others keep this process in step with the rest."""
    return not _only_in_step


def most_rows(batch: Sequences) -> int:
    """Of all processes' batches, the rows of the one that has the most. Every process calls."""
    most = torch.tensor(len(batch.lengths), device=batch.ids.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _packed(backbone: nn.Module, attention: str, batch: Sequences) -> Tensor:
    if attention == SEGMENTS:
        extra: dict[str, object] = {"segments": batch.lengths}
    else:
        ends = torch.tensor([0, *accumulate(batch.lengths)], dtype=torch.int32, device=batch.ids.device)
        longest = max(batch.lengths)
        extra = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    output = backbone(input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False, **extra)
    return output.last_hidden_state[0]


def _of_row(backbone: nn.Module, row: Tensor) -> Tensor:
    """As anyone would call it: (tokens, hidden)."""
    return backbone(input_ids=row[None], **accepted(type(backbone), use_cache=False)).last_hidden_state[0]


def accepted(kind: type[nn.Module], **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that the forward of such a module takes."""
    names = _parameters(kind)
    return arguments if "**" in names else {name: value for name, value in arguments.items() if name in names}


@lru_cache
def _parameters(kind: type[nn.Module]) -> frozenset[str]:
    parameters = inspect.signature(kind.forward).parameters.values()
    return frozenset("**" if each.kind is each.VAR_KEYWORD else each.name for each in parameters)
