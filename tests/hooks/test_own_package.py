"""Hooks from a package of the user's own, as the README tells people to write them, through train.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
FEW = ["loss=sft", "train.steps=4", "train.batch_size=8", "checkpoint.every=2", "optim.lr=1e-3", "exp_name=run"]
SAVES = """
from halos.hooks.checkpoint import CheckpointHook


class Odd(CheckpointHook):
    def due(self, run):
        return run.step % 2 == 1
"""


def start(place: Path, *words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python train.py` in the directory `place`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **({"PYTHONPATH": str(path)} if path else {})}
    return processes.run(
        [sys.executable, str(ROOT / "train.py"), *words], cwd=place, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The README's examples, in a directory of its own."""
    place = tmp_path / "place"
    (place / "myhooks").mkdir(parents=True)
    text = (ROOT / "halos" / "hooks" / "README.md").read_text()
    for name, code in re.findall(r"```python\n# (myhooks/[\w/]+\.py)\n(.*?)```", text, re.S):
        (place / name).write_text(code)
    (place / "myhooks" / "saves.py").write_text(SAVES)
    return place


def test_the_hook_in_the_readme_works_from_the_current_directory_and_through_a_resume(package: Path, cache: Path) -> None:
    hook = "+hooks.spikes={_target_: myhooks.spikes.Spikes, limit: 0}"
    done = start(package, *SMALL, *FEW, f"cache_dir={cache}", "plugins=[myhooks]", hook)
    assert done.returncode == 1, done.stderr
    result = json.loads((package / "runs" / "run" / "result.json").read_text())
    assert (result["status"], result["step"]) == ("stopped", 3)
    assert result["reason"] == "3 steps with a gradient norm above 0.0"
    untyped = start(package, "resume=runs/run")
    assert untyped.returncode == 2
    assert "plugins=[myhooks]" in untyped.stderr
    done = start(package, "resume=runs/run", "plugins=[myhooks]", "hooks.spikes.limit=1e9")
    assert done.returncode == 0, done.stderr
    assert "changed: hooks.spikes" in (package / "runs" / "run" / "train.log").read_text()


def test_what_the_readme_measures_by_sampling_is_what_the_run_is_judged_by(package: Path, cache: Path) -> None:
    words = ["+hooks.sums={_target_: myhooks.sums.Sums, up_to: 2, tokens: 4}", "plugins=[myhooks]", "train.eval_every=2",
             "objective.metric=sums/accuracy", "objective.mode=max", "checkpoint.keep_best=1"]  # fmt: skip
    done = start(package, *SMALL, *FEW, f"cache_dir={cache}", *words)
    assert done.returncode == 0, done.stderr
    directory = package / "runs" / "run"
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if row["split"] == "eval"]
    assert [row["step"] for row in held_out] == [0, 2, 4]
    assert all(0 <= row["sums/accuracy"] <= 1 and row["loss"] > 0 for row in held_out)
    assert json.loads((directory / "result.json").read_text())["metrics"]["sums/accuracy"] == held_out[-1]["sums/accuracy"]
    plain = start(package, *SMALL, *FEW, f"cache_dir={cache}", "exp_name=plain", "train.eval_every=2")
    assert plain.returncode == 0
    others = [json.loads(line) for line in (package / "runs" / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in others] == [row["loss"] for row in rows], "sampling leaves nothing behind in the run"


@pytest.mark.cold
def test_a_checkpoint_hook_of_the_users_own_replaces_ours(package: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    words = ["checkpoint._target_=myhooks.saves.Odd", "plugins=[myhooks]"]
    done = start(tmp_path / "elsewhere", *SMALL, *FEW, f"cache_dir={cache}", *words, path=package)
    assert done.returncode == 0, done.stderr
    saves = tmp_path / "elsewhere" / "runs" / "run" / "checkpoints"
    assert sorted(os.listdir(saves)) == ["step-00000001", "step-00000003"]
