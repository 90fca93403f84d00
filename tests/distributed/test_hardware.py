"""Hardware is detected: a GPU, which torch is only made to believe in here, and a processor that is slow in bfloat16."""

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from halos import train
from halos.inspection import speed
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


@pytest.mark.parametrize(("bfloat16", "said"), [(1.7, "at 59% of the rate"), (65, "at 1.5% of the rate"), (0.5, None)])
def test_a_processor_that_multiplies_bfloat16_slowly_is_named(
    bfloat16: float, said: str | None, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seconds = {torch.bfloat16: [99.0, bfloat16, 98.0], torch.float32: [1.0, 8.0, 3.0]}
    monkeypatch.setattr(speed, "product_seconds", lambda _inner, _outer, dtypes, *_, **__: [seconds[dtype] for dtype in dtypes])
    words = ["loss=sft", "train.steps=1", "train.batch_size=2", "train.eval_at_start=false", f"cache_dir={cache}"]
    train([*SMALL, *words, "train.precision=bfloat16", f"output_root={tmp_path}", "exp_name=run"])
    warnings = [line for line in capsys.readouterr().out.splitlines() if "multiplies bfloat16" in line]
    assert len(warnings) == (said is not None), warnings
    assert said is None or f"multiplies bfloat16 {said} of float32" in warnings[0]
