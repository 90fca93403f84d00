"""How long a run takes, from the FLOPs that it needs and the rate of a matrix product on its device."""

import statistics
import time
from functools import cache

import torch

ROWS, TRIALS = 512, 5
SHARE = {"cpu": 0.5, "cuda": 0.35}  # of that rate that training reaches, typically


@cache  # of one process: a sweep's jobs share it
def gemm_rate(inner: int, outer: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of a product (512, inner) @ (inner, outer): the median of five, in some hundredths of a second."""
    left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((ROWS, inner), (inner, outer)))
    seconds = []
    for _ in range(TRIALS + 1):
        _wait(device)
        began = time.perf_counter()
        left @ right
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * ROWS * inner * outer / statistics.median(seconds[1:])


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
