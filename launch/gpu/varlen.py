"""One variable-length kernel for packed sequences beside one call for each, on this card: exactness, bits and milliseconds."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpu.kernels import BOUNDS, Attention, attention_error, milliseconds, tensors
from gpu.place import Place, Result
from halos.distributed.device import prepare_torch
from halos.logps import varlen, varlen_trial
from halos.logps.attention import attend_by_tree, attend_in_one_call
from halos.types import Tree

SHAPES: dict[str, tuple[Tree, ...]] = {  # 14,000 to 16,000 tokens
    "8 long rows": ((2000,),) * 8,
    "40 rows": tuple((150 + 10 * n,) for n in range(40)),
    "26 pairs": tuple((200 + 7 * n, 150 + 3 * n, 120) for n in range(26)),
    "8 groups of 8": ((400, *(200,) * 8),) * 8,
}
HEADS, KV_HEADS = 12, 2  # of a model of 1.5 B parameters
WINDOW = 256
RUNS = 5

Step = Callable[[], list[Tensor]]


def check(name: str, place: Place) -> Result:
    """Right against float64, the same bits twice where they are asked for, and taken for every shape; how fast it is, is said."""
    if not place.cuda:
        return Result("skipped", "torch's kernel runs on a card alone")
    prepare_torch()
    if (why := varlen_trial.why_not(torch.device(place.device))) is not None:
        return Result("failed", f"refused by the trial: torch's kernel {why}")
    error = attention_error(place.device, torch.bfloat16, attend_in_one_call) / BOUNDS[torch.bfloat16]
    times = {title: measured(place, trees, torch.bfloat16) for title, trees in SHAPES.items()}
    times["26 pairs in a window"] = measured(place, SHAPES["26 pairs"], torch.bfloat16, window=WINDOW)
    same = repeats(place, SHAPES["26 pairs"], torch.bfloat16)
    figure = f"error {error:.2f} of its bound, {'the same' if same else 'OTHER'} bits twice; milliseconds of a layer: "
    figure += ", ".join(f"{title} {each['segments ms']:.3g} -> {each['varlen ms']:.3g}" for title, each in times.items())
    right = error <= 1 and same and all(each["taken"] for each in times.values())
    return Result.of(right, figure, error_over_bound=error, same_bits=same, times=times)


def measured(place: Place, trees: tuple[Tree, ...], dtype: torch.dtype, *, window: int | None = None) -> dict[str, Any]:
    """Median milliseconds of forward and backward pass of a layer's attention, each way, and peak memory above the inputs; and
    whether the kernel takes it."""
    found: dict[str, Any] = {"taken": varlen.takes(*_inputs(place, trees, dtype), softcap=None, sinks=None, dropout=0.0)}
    for title, attention in (("segments", attend_by_tree), ("varlen", attend_in_one_call)):
        step = _step(attention, place, trees, dtype, window)
        step()
        before = 0
        if place.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        found[f"{title} ms"] = statistics.median(milliseconds(place, step) for _ in range(RUNS))
        if place.cuda:
            found[f"{title} peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def repeats(place: Place, trees: tuple[Tree, ...], dtype: torch.dtype) -> bool:
    """Whether output and gradients are the same to the bit five times, with torch's deterministic kernels."""
    step = _step(attend_in_one_call, place, trees, dtype, None)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (step() for _ in range(RUNS))
    finally:
        torch.use_deterministic_algorithms(False)
    return all(torch.equal(one, other) for each in others for one, other in zip(first, each, strict=True))


def _inputs(place: Place, trees: tuple[Tree, ...], dtype: torch.dtype) -> list[Tensor]:
    return [each.requires_grad_() for each in tensors(trees, place.device, dtype, HEADS, KV_HEADS, size=128)]


def _step(attention: Attention, place: Place, trees: tuple[Tree, ...], dtype: torch.dtype, window: int | None) -> Step:
    """A call of forward and backward pass: the output, and the gradients of query, key and value."""
    inputs, module = _inputs(place, trees, dtype), nn.Module()

    def step() -> list[Tensor]:
        output, _ = attention(module, *inputs, None, sliding_window=window, trees=trees)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]

    return step
