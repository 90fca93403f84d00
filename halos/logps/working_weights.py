"""bfloat16 working weights: casts of float32 weights, by autocast and by our own layers, made once for all of a step."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_kept: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] | None = None  # by id of the weight: it, which stays, and its cast
_thread = threading.local()


@contextmanager
def kept_casts(keep: bool) -> Iterator[None]:
    """Within, if `keep`, a cast stays until the end, and not until the end of each forward pass. No weight may change within,
    unless `drop_casts` follows."""
    global _kept
    if keep:
        torch.autocast_increment_nesting()
        _kept = {}
    try:
        yield
    finally:
        if keep:
            _kept = None
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()  # also of what was cast in a thread that keeps casts


def keep_in_backward(outputs: Sequence[Tensor]) -> None:
    """Let the backward pass through a model's `outputs` keep casts too. It runs in another thread on a GPU, whose contexts of
    autocast would drop those of all threads as they end."""
    owner = threading.get_ident()

    def keep(_: Tensor) -> None:
        if threading.get_ident() != owner and not hasattr(_thread, "keeps"):
            torch.autocast_increment_nesting()  # for as long as the thread lives
            _thread.keeps = True

    for output in outputs:
        if _kept is not None and output.requires_grad:
            output.register_hook(keep)


def drop_casts() -> None:
    """After weights have changed under autocast, which otherwise computes with its casts of them until its context ends."""
    torch.clear_autocast_cache()
    if _kept is not None:
        _kept.clear()


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in `dtype`, with a gradient that is the weight's; kept where casts are."""
    if torch.compiler.is_compiling() or _kept is None or weight.dtype is dtype:
        return weight.to(dtype)
    key = id(weight), dtype
    if key not in _kept:
        with torch.enable_grad():  # whoever casts it first may need none
            _kept[key] = weight, weight.to(dtype)
    return _kept[key][1]
