"""All packed sequences in one call of torch's variable-length flash attention: its arguments, and which calls it can take.

The queries of a tree lie as the kernel wants them, [trunk, first branch] [second branch] ...; its keys and values are copied so
that each further branch stands behind its own trunk. The kernel is causal from the lower right where keys are more than queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from halos.transfer import to_device
from halos.types import Tree

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
LARGEST = 256  # size of a head


@dataclass(frozen=True, slots=True)
class Layout:
    """The sequences of packed trees, and how their keys are put together of the pieces of the trees."""

    query_ends: Tensor  # (sequences + 1,) int32, from 0
    key_ends: Tensor  # (sequences + 1,) int32, from 0
    longest_query: int
    longest_key: int
    pieces: list[int]  # tokens of trunks and branches; of a tree with at most one branch, of all of it
    order: list[int]  # of the pieces, by number; a trunk once for each branch

    @property
    def repeats(self) -> bool:
        """Whether a trunk is read by more than one sequence."""
        return len(self.order) > len(self.pieces)


@lru_cache(maxsize=8)  # every layer of a forward pass has the same trees, and so have the layers that a backward pass recomputes
def layout_of(trees: tuple[Tree, ...], device: torch.device) -> Layout:
    """The arguments that depend on the trees alone; one copy to the device, for which the host does not wait."""
    pieces, order = list[int](), list[int]()
    queries, keys = list[int](), list[int]()
    for trunk, *branches in trees:
        own, first = [each for each in branches if each], len(pieces)
        whole = trunk + sum(own[:1])
        queries += [whole, *own[1:]]
        keys += [whole, *(trunk + each for each in own[1:])]
        if len(own) > 1:
            pieces += [trunk, *own]
            order += [number for last in range(first + 1, len(pieces)) for number in (first, last)]
        else:
            pieces.append(whole)
            order.append(first)
    ends = [[0, *accumulate(each)] for each in (queries, keys)]
    with torch.inference_mode(False):  # else the tensors of an evaluation could not be kept for a later backward pass
        query_ends, key_ends = to_device(torch.tensor(ends, dtype=torch.int32, device="cpu"), device)
    return Layout(query_ends, key_ends, max(queries), max(keys), pieces, order)


def takes(query: Tensor, key: Tensor, value: Tensor, *, softcap: float | None, sinks: Tensor | None, dropout: float) -> bool:
    """Whether the kernel can compute this attention: half precision on a GPU, nothing but a softmax, heads of sizes it has."""
    size = query.shape[-1]
    return (
        query.device.type in DEVICES
        and softcap is None
        and sinks is None
        and dropout == 0
        and key.shape[-1] == value.shape[-1] == size
        and size % 8 == 0
        and size <= LARGEST
        and not 192 < size <= 224  # of these, cards of compute capability 8.6, 8.9 and 12 have no backward pass
        and len(dtypes := {_computed_in(each) for each in (query, key, value)}) == 1
        and dtypes <= {*DTYPES}
    )


def _computed_in(tensor: Tensor) -> torch.dtype:
    """The dtype in which attention is computed. Autocast knows torch's own attention, and not this kernel."""
    is_cast = torch.is_autocast_enabled(tensor.device.type) and tensor.dtype is not torch.float64
    return torch.get_autocast_dtype(tensor.device.type) if is_cast else tensor.dtype


def attend(
    query: Tensor,  # (1, heads, tokens, head_dim)
    key: Tensor,  # (1, kv_heads, tokens, head_dim)
    value: Tensor,
    trees: tuple[Tree, ...],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention within each sequence of `trees`: (1, tokens, heads, head_dim). `window`: keys that a token reads, of which
    it is one itself."""
    layout = (layout_of if type(query) is Tensor else layout_of.__wrapped__)(trees, query.device)  # in an estimate: kept for none
    assert query.shape[2] == sum(layout.pieces), "tokens outside of all sequences would have gradients that are not numbers"
    q, k, v = (_by_token(each) for each in (query, key, value))
    earlier = window - 1 if window is not None and window < layout.longest_key else -1
    output = kernel()(
        q,
        _in_sequences(k, layout),
        _in_sequences(v, layout),
        layout.query_ends,
        layout.key_ends,
        layout.longest_query,
        layout.longest_key,
        scale=scale,
        window_size=(earlier, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[None]


def _by_token(tensor: Tensor) -> Tensor:
    """(1, heads, tokens, head_dim) -> (tokens, heads, head_dim), in the dtype of the kernel, which needs a head in one piece."""
    tokens = tensor[0].transpose(0, 1).to(_computed_in(tensor))
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def _in_sequences(tokens: Tensor, layout: Layout) -> Tensor:
    """Keys or values, (tokens, kv_heads, head_dim), with a trunk before each of its branches. The gradient of a trunk is a sum in
    a fixed order: that of an index would be one of atomic additions."""
    if not layout.repeats:
        return tokens
    pieces = tokens.split(layout.pieces)
    return torch.cat([pieces[number] for number in layout.order])


@cache
def kernel() -> Callable[..., Any]:
    """Raises ImportError where torch has none."""
    from torch.nn.attention.varlen import varlen_attn  # here: it imports torch's compiler, which most runs do not need

    return varlen_attn
