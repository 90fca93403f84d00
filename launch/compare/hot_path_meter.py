"""What hot_path.py measures inside a process that trains, the same for halos and for TRL: it needs torch alone."""

import ctypes
import gc
import json
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import is_fake

MIB = 2**20


class Meter:
    """CPU-seconds and useful tokens of each step, peak memory above the loaded model, and the rate of a matrix product.

    `gemm` is (inner, outer): the product is (1024, inner) @ (inner, outer), the model's own largest layer. Call `begin` when
    the model is loaded, `step_begins` and `step_ends` at each step, and `write` after the last one.
    """

    def __init__(self, gemm: tuple[int, int], dtype: torch.dtype) -> None:
        self._gemm, self._dtype = gemm, dtype
        self._steps: list[dict[str, float]] = []
        self._prepared = 0.0  # CPU-seconds before the first step that belong to training, such as reference log-probs
        self._loaded = self._started = self._cpu = self._earlier_peak = 0.0
        self._first = self._first_cpu = 0.0  # seconds and CPU-seconds until the first step, without those of measuring
        self._running = False
        self._rates: list[float] = []

    def begin(self, policy: torch.nn.Module, *, prepared: float = 0.0, earlier_peak: float = 0.0) -> None:
        """The model is loaded, nothing is trained; `prepared` CPU-seconds have been spent on it before, with a peak of
        `earlier_peak` MiB."""
        self._earlier_peak = earlier_peak
        self._first, self._first_cpu = time.time() - float(os.environ["HOT_PATH_BEGAN"]), time.process_time()
        self._prepared, self._rates = prepared, [gemm_rate(*self._gemm, self._dtype)]
        self._loaded = loaded_mib(policy)
        Path("/proc/self/clear_refs").write_text("5")  # restart the peak
        self._started, self._cpu = time.time(), time.process_time()

    def step_begins(self) -> None:
        """Nothing after the first step, which begins where the last one ends: all that happens between counts."""
        if not self._running:
            spent = time.process_time() - self._cpu
            self._prepared, self._first_cpu = self._prepared + spent, self._first_cpu + spent
            self._first += time.time() - self._started
            self._running, self._cpu = True, time.process_time()

    def step_ends(self, tokens: int) -> None:
        """`tokens` (useful ones: prompt and completion of every row) were trained on in this step."""
        now = time.process_time()
        self._steps.append({"cpu_s": now - self._cpu, "tokens": tokens})
        self._cpu = now

    def write(self, path: Path) -> None:
        peak = max(resident_mib("VmHWM"), self._earlier_peak) - self._loaded
        self._rates.append(gemm_rate(*self._gemm, self._dtype))
        measured = {
            "prepared_cpu_s": self._prepared, "steps": self._steps, "peak_above_model_mib": peak, "loaded_mib": self._loaded,
            "first_step_after_s": self._first, "first_step_after_cpu_s": self._first_cpu,
            "gemm_flops_per_s": statistics.mean(self._rates), "torch": torch.__version__,
        }  # fmt: skip
        path.write_text(json.dumps(measured))


def gemm_rate(inner: int, outer: int, dtype: torch.dtype) -> float:
    """FLOPs per CPU-second of a matrix product: the median of nine."""
    left, right, seconds = torch.randn(1024, inner).to(dtype), torch.randn(inner, outer).to(dtype), []
    left @ right
    for _ in range(9):
        began = time.process_time()
        for _ in range(3):
            left @ right
        seconds.append((time.process_time() - began) / 3)
    return 2 * 1024 * inner * outer / statistics.median(seconds)


def resident_mib(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / MIB


def loaded_mib(policy: torch.nn.Module) -> float:
    """Resident memory without what is free but not returned, and without tensors besides the policy's: a second model counts as
    memory above the loaded one. Weights that are only mapped from their file are read first."""
    own = storages([*policy.parameters(), *policy.buffers()])
    others = storages(one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and not is_fake(one))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    besides = sum(size for place, size in others.items() if place not in own)
    return resident_mib("VmRSS") - besides / MIB


@torch.no_grad()
def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address and size of the storages in host memory, each of which is read once."""
    found = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in found:
                found[storage.data_ptr()] = storage.nbytes()
                torch.empty(0, dtype=torch.uint8).set_(storage)[::4096].sum()
    return found
