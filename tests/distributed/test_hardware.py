"""Hardware is detected: a GPU, which torch is only made to believe in here, and a processor without bfloat16."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
PRETEND = """
import torch
torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_, **__: True
torch.cuda.device_count = lambda: 1
from halos.distributed.launch import make_accelerator
accelerator = make_accelerator("auto")
print(accelerator.device.type, accelerator.num_processes, accelerator.mixed_precision)
"""


def test_one_process_on_one_gpu_needs_no_launcher() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = processes.run([sys.executable, "-c", PRETEND], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["cuda", "1", "bf16"], done.stderr


def test_a_processor_that_only_emulates_bfloat16_is_named(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        pytest.skip("no /proc/cpuinfo to compare with")
    overrides = ["train.steps=1", "train.batch_size=2", "train.eval_at_start=false", "exp_name=run"]
    done = command("loss=sft", "train.precision=bfloat16", *overrides)
    emulated = "avx2" in flags and "avx512_bf16" not in flags and "amx_bf16" not in flags
    assert ("this processor has no bfloat16" in done.stdout + done.stderr) is emulated
