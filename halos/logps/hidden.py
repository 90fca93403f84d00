"""A backbone's hidden states: over sequences packed end to end, or over one sequence at a time."""

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

from halos.logps.attention import TREES
from halos.transfer import to_device
from halos.types import Sequences

PACKS = (*TREES, "flash_attention_2")  # attention that takes sequence boundaries; with any other, sequences go one at a time


def name_of_backbone(model: PreTrainedModel) -> str | None:
    """The name within the model of the submodule under its head; None where that is not one submodule."""
    if isinstance(model._modules.get(model.base_model_prefix), nn.Module):
        return model.base_model_prefix
    inner = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else None


def backbone_of(model: PreTrainedModel) -> nn.Module | None:
    name = name_of_backbone(model)
    return None if name is None else model._modules[name]


def is_packed(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation in PACKS


def hidden_states(model: PreTrainedModel, batch: Sequences, *, equal_calls: bool = False) -> Tensor:
    """The last hidden states of all tokens: (tokens, hidden). No sequence influences another.

    `equal_calls`: every rank calls the layers equally often, as it must where they are sharded.
    """
    backbone = backbone_of(model)
    assert backbone is not None, f"{type(model).__name__} has no backbone: its plan must call it as a whole"
    if is_packed(model):
        return _packed(backbone, str(model.config._attn_implementation), batch)
    rows = batch.ids.split(batch.lengths)
    # before the layers, whose own collectives must not interleave with this one
    padding_calls = max_rows_over_ranks(batch) - len(rows) if equal_calls else 0
    flat = torch.cat([_of_row(backbone, row) for row in rows])
    with _padding_calls():
        for _ in range(padding_calls):
            flat = flat + 0.0 * _of_row(backbone, rows[0]).sum()
    return flat


_is_padding_call = False


@contextmanager
def _padding_calls() -> Iterator[None]:
    global _is_padding_call
    _is_padding_call = True
    try:
        yield
    finally:
        _is_padding_call = False


def is_padding_call() -> bool:
    """Whether the current forward pass only keeps this rank's number of layer calls equal to that of the others."""
    return _is_padding_call


def max_rows_over_ranks(batch: Sequences) -> int:
    """The largest number of sequences in any rank's batch. Every rank calls."""
    most = torch.full((), len(batch.lengths), device=batch.ids.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _packed(backbone: nn.Module, attention: str, batch: Sequences) -> Tensor:
    if attention in TREES:
        extra: dict[str, object] = {"trees": batch.trees}
    else:
        ends = to_device(torch.tensor([0, *accumulate(batch.lengths)], dtype=torch.int32), batch.ids.device)
        longest = max(batch.lengths)
        extra = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    output = backbone(input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False, **extra)
    return output.last_hidden_state[0]


def _of_row(backbone: nn.Module, row: Tensor) -> Tensor:
    """One sequence through the backbone, called without packing arguments: (tokens, hidden)."""
    return backbone(input_ids=row[None], **accepted(type(backbone), use_cache=False)).last_hidden_state[0]


def accepted(kind: type[nn.Module], **arguments: Any) -> dict[str, Any]:
    """The subset of the arguments that the forward of this class takes."""
    names = _parameters(kind)
    return arguments if "**" in names else {name: value for name, value in arguments.items() if name in names}


@lru_cache
def _parameters(kind: type[nn.Module]) -> frozenset[str]:
    parameters = inspect.signature(kind.forward).parameters.values()
    return frozenset("**" if each.kind is each.VAR_KEYWORD else each.name for each in parameters)


def whole_model(model: PreTrainedModel, row: Tensor, keep: Tensor | None = None) -> Tensor:
    """The model's own output for one sequence: (tokens, vocabulary) logits, only at indices `keep`, or (1, labels) scores."""
    some = {} if keep is None else accepted(type(model), logits_to_keep=keep)
    logits = model(input_ids=row[None], **some, **accepted(type(model), use_cache=False)).logits
    logits = logits if logits.dim() == 2 else logits[0]
    return logits if keep is None or len(logits) == len(keep) else logits[keep]  # some forwards ignore logits_to_keep
