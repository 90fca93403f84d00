"""Attention over packed sequences: nothing attends across sequences, and a shared prompt is computed once.

Registered with transformers, so no model's code is changed. Under `SEGMENTS` sequences attend one at a time: on a CPU several
times faster than one dense block-diagonal mask, on a GPU hundreds of small kernels a layer. Under `VARLEN` one kernel computes
them all (varlen.py), and what it cannot take, one layer's sinks or all on a CPU, is computed one at a time.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from halos.errors import UserError
from halos.logps import blockwise, varlen
from halos.types import Tree

PREFIX = "halos_"  # of a value of model.attention, as transformers knows it
SEGMENTS, VARLEN = f"{PREFIX}segments", f"{PREFIX}varlen"
TREES = (SEGMENTS, VARLEN)  # attention that takes the trees of packed sequences


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention that SDPA does not support: soft-capped logits (Gemma 2), and sinks, a logit (heads,) that takes part in the
    softmax but has no value (gpt-oss). Shapes (1, heads, time, head_dim)."""
    logits = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, float("-inf")).float()
    if sinks is not None:
        logits = torch.cat([logits, sinks.float().reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)], -1)
    weights = logits.softmax(-1)[..., : key.shape[2]].to(query.dtype)
    return drop(weights, dropout) @ value


def _causal(queries: int, keys: int, window: int | None, *, device: torch.device) -> Tensor:
    """Causal mask of the last `queries` of `keys` tokens, each limited to the last `window` keys where there is a window:
    (queries, keys) bool."""
    earlier = keys - queries
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(earlier)
    return causal if window is None else causal.triu(earlier + 1 - window)


@dataclass(frozen=True, slots=True)
class _Settings:
    """What attention is besides queries, keys and values."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    dropout: float
    is_blockwise: bool = False  # keys and values have fewer heads then, where several queries share them

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the last tokens of a sequence to all of it: query (1, heads, queries, head_dim), key and value
        (1, heads, keys, head_dim)."""
        queries, keys = query.shape[2], key.shape[2]
        window = self.window if self.window is not None and self.window < keys else None
        if self.is_blockwise:
            return blockwise.attend(query, key, value, scale=self.scale, window=window)
        if self.softcap is not None or self.sinks is not None:
            mask = _causal(queries, keys, window, device=query.device)
            return _eager(query, key, value, mask, scale=self.scale, softcap=self.softcap, sinks=self.sinks, dropout=self.dropout)
        if window is None and queries == keys:
            return scaled_dot_product_attention(query, key, value, None, self.dropout, is_causal=True, scale=self.scale)
        mask = _causal(queries, keys, window, device=query.device)
        return scaled_dot_product_attention(query, key, value, mask, self.dropout, scale=self.scale)


def attend_by_tree(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head_dim)
    key: Tensor,  # (1, kv_heads, tokens, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    trees: tuple[Tree, ...] | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of `trees`, whose tokens add up to all: (1, tokens, heads, head_dim).

    A branch attends to its trunk and to itself.

    Raises UserError without them: a hook has called the model directly, or its architecture does not pass the argument on.
    """
    if trees is None:
        raise UserError(
            f"{type(module).__name__} was called without the lengths of packed sequences: call generate and model(...) of a model"
            " in training inside `with halos.logps.model.plainly(model):`"
        )
    groups, is_plain = query.shape[1] // key.shape[1], softcap is None and s_aux is None and not dropout
    is_blockwise = is_plain and blockwise.takes(query, key, value)
    if is_blockwise:
        query, key, value = (each.bfloat16() for each in (query, key, value))
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    settings, outputs = _Settings(scale, sliding_window, softcap, s_aux, dropout, is_blockwise), list[Tensor]()
    # the trunk is followed by the first branch, so that both are one sequence; one split, since each slice's gradient is a whole
    sizes = [[sum(tree[:2]), *filter(None, tree[2:])] for tree in trees]
    parts = zip(*(each.split([size for tree in sizes for size in tree], 2) for each in (query, key, value)), strict=True)
    for tree, branches in zip(trees, sizes, strict=True):
        q, k, v = next(parts)
        outputs.append(settings.attend(q, k, v))
        trunk = [each[:, :, : tree[0]] for each in (k, v)] if len(branches) > 1 else []
        for q, *own in islice(parts, len(branches) - 1):
            outputs.append(settings.attend(q, *(torch.cat(both, 2) for both in zip(trunk, own, strict=True))))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None  # contiguous: some models call view on it


def attend_in_one_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The same as `attend_by_tree`, by one kernel where it takes the inputs."""
    trees, softcap, sinks = (more.get(name) for name in ("trees", "softcap", "s_aux"))
    if trees is not None and varlen.takes(query, key, value, softcap=softcap, sinks=sinks, dropout=dropout):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return varlen.attend(query, key, value, trees, scale=scale, window=sliding_window), None
    return attend_by_tree(module, query, key, value, attention_mask, dropout, scaling, sliding_window, **more)


def register() -> None:
    """Register the `attn_implementation`s of TREES with transformers, which makes no mask for attention that has registered none:
    each sequence is causal by itself. For any other it searches the positions for packed sequences, and the host waits."""
    AttentionInterface.register(SEGMENTS, attend_by_tree)
    AttentionInterface.register(VARLEN, attend_in_one_call)
