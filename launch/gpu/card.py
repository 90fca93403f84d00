"""The card: what it is, what it supports, and how fast it multiplies."""

import os
import shutil
import statistics
import subprocess
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from hot_path_meter import gemm_rate as cpu_gemm_rate

from gpu.place import Place, Result
from halos.versions import versions

GIB = 2**30
SIDE = 8192  # of the square matrices that are timed
# FLOP/s of dense products of bfloat16 with float32 sums, from the vendor's data sheets: the first part of a name that matches
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A40": 149.7e12, "A10G": 70e12, "A10": 125e12, "RTX A6000": 154.8e12, "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}  # fmt: skip


def peak(name: str, dtype: str, measured: float) -> tuple[float, str]:
    """FLOP/s in `dtype`, and where the number is from: the table, else a product measured in this run."""
    for part, value in PEAKS.items() if dtype == "bfloat16" else ():
        if part.lower() in name.lower():
            return value, f"peak {value / 1e12:.0f} TFLOP/s in bfloat16, from its data sheet"
    return measured, f"peak {measured / 1e12:.3g} TFLOP/s in {dtype}, as measured"


def gemm_rate(device: str, dtype: torch.dtype, *, side: int = SIDE) -> float:
    """FLOP/s of a square matrix product: the median of five measurements of four products each; on a CPU of a small one."""
    if device == "cpu":
        return cpu_gemm_rate(256, 1024, dtype)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            left @ right
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / 4)
    return 2 * side**3 / statistics.median(times[1:])  # the first chooses a kernel


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cuda() -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": torch.cuda.get_device_name(0), "count": torch.cuda.device_count(), "driver": _driver(),
        "capability": f"{properties.major}.{properties.minor}", "multiprocessors": properties.multi_processor_count,
        "memory_gib": total / GIB, "free_gib": free / GIB, "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def check(name: str, place: Place) -> Result:
    """The record of the environment, after one product in each dtype."""
    if place.cuda and not torch.cuda.is_available():
        why = f"no usable CUDA card (torch {torch.__version__}, CUDA {torch.version.cuda})"
        return Result("failed", f"{why}; DEVICE=cpu tries the suite itself")
    record = {
        **(_cuda() if place.cuda else {"name": "a CPU", "bfloat16": True}), **versions(), "cores": os.cpu_count(),
        "host_memory_gib": psutil.virtual_memory().total / GIB, "disk_free_gib": shutil.disk_usage(place.work).free / GIB,
        "flash_attn": find_spec("flash_attn") is not None, "tf32": torch.get_float32_matmul_precision() != "highest",
    }  # fmt: skip
    dtypes = {"float32": torch.float32}
    if place.cuda:  # a CPU may take minutes for halves
        dtypes |= {"float16": torch.float16, **({"bfloat16": torch.bfloat16} if record["bfloat16"] else {})}
    rates = {title: gemm_rate(place.device, dtype) for title, dtype in dtypes.items()}
    used = "bfloat16" if "bfloat16" in rates else "float32"
    value, source = peak(record["name"], used, rates[used])
    record |= {"gemm_flops_per_s": rates, "dtype": used, "peak": value, "peak_is": source}
    measured = ", ".join(f"{title} {rate / 1e12:.3g}" for title, rate in rates.items())
    return Result("passed", f"{record['name']}; measured TFLOP/s: {measured}; {source}", record)
