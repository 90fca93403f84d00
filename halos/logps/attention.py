"""Attention over packed sequences, one segment at a time: nothing attends across sequences and no mask is built.

Registered with transformers under `SEGMENTS`, so no model's code is changed. On a CPU it is several times faster than one
dense block-diagonal mask; on a GPU flash_attention_2 is used instead where it is installed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from halos.errors import UserError

SEGMENTS = "halos_segments"


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


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """Causal mask, limited to the last `window` keys where there is a window: (length, length) bool."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


def attend_by_segment(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head_dim)
    key: Tensor,  # (1, kv_heads, tokens, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: tuple[int, ...] | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of `segments` (lengths that add up to tokens): (1, tokens, heads, head_dim).

    Raises UserError without them: a hook has called the model directly, or its architecture does not pass the argument on.
    """
    if segments is None:
        raise UserError(
            f"{type(module).__name__} was called without the lengths of packed sequences: call generate and model(...) of a model"
            " in training inside `with halos.logps.model.plainly(model):`"
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for q, k, v in zip(query.split(segments, 2), key.split(segments, 2), value.split(segments, 2), strict=True):
        length = q.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < length else None
        if softcap is not None or s_aux is not None:
            output = _eager(q, k, v, _band(length, window, q.device), scale=scale, softcap=softcap, sinks=s_aux, dropout=dropout)
        elif window is not None:
            output = scaled_dot_product_attention(q, k, v, _band(length, window, q.device), dropout, scale=scale)
        else:
            output = scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale)
        outputs.append(output)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None  # contiguous: some models call view on it


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask: each segment is causal by itself."""


def register() -> None:
    """Register `attn_implementation=SEGMENTS` with transformers."""
    AttentionInterface.register(SEGMENTS, attend_by_segment)
    AttentionMaskInterface.register(SEGMENTS, _no_mask)
