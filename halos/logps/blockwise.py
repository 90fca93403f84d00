"""Attention of one sequence in bfloat16 on a CPU, by matrix products over blocks of queries.

Two to three times as fast as torch's own there, whose products are of a few rows at a time, and as exact: logits and softmax are
in float32, weights and values are multiplied in bfloat16 and summed in float32. Nothing of the size queries x keys is kept: the
backward pass computes the weights of a block again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries: their logits stay in a core's cache
# added to the logits of a block's own keys, of which a query does not see later ones; made here, whatever mode a call is in
_LATER = torch.full((BLOCK, BLOCK), float("-inf"), device="cpu").triu(1)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch would compute attention of these inputs in bfloat16 on a CPU: autocast gives it all inputs so."""
    if query.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") is torch.bfloat16
    return query.dtype is key.dtype is value.dtype is torch.bfloat16


def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Causal attention of the last tokens of a sequence to all of it, or to the last `window` tokens before each and itself.

    query: (1, heads, queries, head_dim); key and value: (1, kv_heads, keys, head_dim), of which each serves as many heads.
    """
    return _Blockwise.apply(query, key, value, scale, window)  # type: ignore[return-value]


class _Block(NamedTuple):
    """Queries start:end, and the keys that they see."""

    start: int
    end: int
    first: int
    last: int


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = scale, window
        queries, groups = query.shape[2], query.shape[1] // key.shape[1]
        (query, key), keys = (each[0].float() for each in (query, key)), key.shape[2]
        output = value.new_empty(key.shape[0], groups, queries, value.shape[3])
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(queries, keys, window):
                weights = _weights(_rows(query, block, groups), key, block, keys - queries, scale, window).to(value.dtype)
                rows = weights @ value[0, :, block.first : block.last]
                output[:, :, block.start : block.end] = rows.view(len(key), groups, -1, rows.shape[2])
        return output.view(1, -1, queries, value.shape[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (query, key, value), (scale, window) = ctx.saved_tensors, ctx.settings
        kv_heads, keys, queries, groups = key.shape[1], key.shape[2], query.shape[2], query.shape[1] // key.shape[1]
        exact_query, exact_key = query[0].float(), key[0].float()
        of_query = query.new_empty(kv_heads, groups, queries, query.shape[3])
        of_key, of_value = torch.zeros_like(exact_key), torch.zeros(value.shape[1:])
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(queries, keys, window):
                seen = slice(block.first, block.last)
                weights = _weights(_rows(exact_query, block, groups), exact_key, block, keys - queries, scale, window)
                rows = _rows(grad_outputs[0][0], block, groups)
                of_value[:, seen] += weights.to(value.dtype).mT @ rows
                of_weights = (rows @ value[0, :, seen].mT).float()
                of_logits = torch._softmax_backward_data(of_weights, weights, -1, torch.float32).to(query.dtype)
                own = (of_logits @ key[0, :, seen]).mul_(scale)
                of_query[:, :, block.start : block.end] = own.view(kv_heads, groups, -1, own.shape[2])
                of_key[:, seen] += of_logits.mT @ _rows(query[0], block, groups)
        of_key *= scale
        return of_query.view(query.shape), of_key.to(key.dtype)[None], of_value.to(value.dtype)[None], None, None


def _blocks(queries: int, keys: int, window: int | None) -> Iterator[_Block]:
    earlier = keys - queries
    for start in range(0, queries, BLOCK):
        end = min(start + BLOCK, queries)
        yield _Block(start, end, 0 if window is None else max(0, earlier + start + 1 - window), earlier + end)


def _rows(heads: Tensor, block: _Block, groups: int) -> Tensor:
    """A block of (heads, queries, head_dim), with the heads that share keys one after another: (kv_heads, rows, head_dim)."""
    return heads[:, block.start : block.end].reshape(heads.shape[0] // groups, -1, heads.shape[2])


def _weights(rows: Tensor, key: Tensor, block: _Block, earlier: int, scale: float, window: int | None) -> Tensor:
    """The softmax weights of a block's queries: (kv_heads, rows, keys from the first seen to the last) float32."""
    seen = key[:, block.first : block.last]
    logits = torch.baddbmm(rows.new_empty(()), rows, seen.mT, beta=0, alpha=scale)
    size = block.end - block.start
    by_query = logits.view(len(key), -1, size, logits.shape[2])
    by_query[..., -size:] += _LATER[:size, :size]  # of other queries of the block
    if window is not None and block.first + window < block.last:
        oldest = torch.arange(earlier + block.start, earlier + block.end)[:, None] - window
        by_query.masked_fill_(torch.arange(block.first, block.last) <= oldest, float("-inf"))
    return logits.softmax(-1)
