"""How much memory a process has needed."""

import resource
import sys

import torch


def peak_mb(device: torch.device) -> float:
    """Peak memory of this process so far in MiB: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)  # bytes on macOS, KiB elsewhere
