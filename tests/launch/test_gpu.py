"""What of a GPU can be seen without one: torch is told that there is one, and nothing is put on it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRETEND = """
import torch
torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_: True
torch.cuda.device_count = lambda: 1
from halos.build.processes import accelerator
made = accelerator("auto")
print(made.device.type, made.num_processes, made.mixed_precision)
"""


def test_one_process_on_one_gpu_needs_no_launcher() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PRETEND], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["cuda", "1", "bf16"], done.stderr
