"""How long a run takes, from the FLOPs that it needs and the rate of a matrix product on its device; and in which type."""

import statistics
import time
from collections.abc import Sequence
from functools import cache

import torch

ROWS, TRIALS = 512, 5
SHARE = {"cpu": 0.5, "cuda": 0.35}  # of that rate that training reaches, typically


@cache  # of one process: a sweep's jobs share it
def gemm_rate(inner: int, outer: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of a product (512, inner) @ (inner, outer): the median of five, in some hundredths of a second."""
    (seconds,) = product_seconds(inner, outer, [dtype], device, trials=TRIALS)
    return 2 * ROWS * inner * outer / statistics.median(seconds)


def product_seconds(
    inner: int, outer: int, dtypes: Sequence[torch.dtype], device: torch.device, *, trials: int
) -> list[list[float]]:
    """Time a product (512, inner) @ (inner, outer) in each of the types in turn, after one turn to warm up."""
    factors = [[torch.ones(shape, dtype=dtype, device=device) for shape in ((ROWS, inner), (inner, outer))] for dtype in dtypes]
    seconds = [list[float]() for _ in dtypes]
    for _ in range(trials + 1):
        for (left, right), times in zip(factors, seconds, strict=True):
            _wait(device)
            began = time.perf_counter()
            left @ right
            _wait(device)
            times.append(time.perf_counter() - began)
    return [times[1:] for times in seconds]


def bfloat16_gain(device: torch.device) -> float:
    """How many times as fast a matrix product is in bfloat16 as in float32, by the fastest of ten each, which other work disturbs
    least. Measured, since processors that have its instructions differ: with AMX or on Zen 4 it is faster, with those of AVX-512
    alone on a Xeon slower, and where it is emulated many times slower."""
    float32, bfloat16 = map(min, product_seconds(1024, 1024, [torch.float32, torch.bfloat16], device, trials=10))
    return float32 / bfloat16


def fast_dtype() -> str:
    """bfloat16 where this machine multiplies it clearly faster than float32; for scripts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bfloat16" if bfloat16_gain(device) > 1.2 else "float32"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(flops: float, rate: float, device: torch.device) -> float:
    return flops / (rate * share_of(device))


def share_of(device: torch.device) -> float:
    return SHARE.get(device.type, SHARE["cuda"])


def readable(seconds: float) -> str:
    """Format as `4 s`, `3 min`, `2.5 h` or `3.1 days`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
