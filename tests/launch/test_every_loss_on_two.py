"""Every loss of config/loss trains five steps on two processes, whole and with LoRA; resumed amid them it has the same bits."""

import os
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.checkpoint.test_every_loss import rewarded, rows, weights
from tests.launch import spread
from tests.losses import cases

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("model=tiny train.prove=off train.steps=5 train.epochs=null train.batch_size=8 train.microbatch_size=3 optim.lr=1e-3"
            " train.eval_every=null train.eval_at_start=false checkpoint.every=2 checkpoint.keep_last=2"
            " data.eval=[{path:arithmetic,split:'eval[:7]'}]")  # fmt: skip
ROWS = ["data.train=[{path:arithmetic,split:'train[:40]'}]"]


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["none", "lora"])
def test_five_steps_on_two_processes_resumed_amid_them_end_like_five_in_one_go(peft: str, tmp_path: Path, cache: Path) -> None:
    names, cells = [case.name for case in cases.of_this_package()], list[str]()
    for name in names:
        data = rewarded(tmp_path) if name == "max_rl" else ROWS  # whose rewards are from 0 up, and labels are -1 and 1
        own = ["peft.modules_to_save=[embed_tokens]"] if (name, peft) == ("csft", "lora") else []
        own += ["reference.name_or_path=tiny"] if name in cases.TAUGHT else []
        cells.append(" ".join([f"loss={name} peft={peft} {SETTINGS} cache_dir={cache}", *data, *own]))
    worker = str(ROOT / "tests" / "launch" / "resuming_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = processes.run(
        [sys.executable, *spread.launcher("ddp", 2), worker, str(tmp_path), *cells],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-20_000:]
    for number, name in enumerate(names):
        whole, resumed = tmp_path / f"whole{number}", tmp_path / f"resumed{number}"
        assert "step-00000004" in (resumed / "attempts" / "001.yaml").read_text(), name
        mine, theirs = weights(resumed), weights(whole)
        assert mine, name
        assert mine.keys() == theirs.keys(), name
        assert all(tensor.equal(theirs[key]) for key, tensor in mine.items()), name
        assert rows(resumed) == rows(whole), name
