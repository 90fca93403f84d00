"""Hooks from a package of the user's own, written as the manual shows, through train.py."""

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


def start(directory: Path, *overrides: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python train.py` in `directory`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    return processes.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


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


def test_the_manuals_metric_of_sampled_answers_is_the_objective_of_a_run(package: Path, cache: Path) -> None:
    overrides = ["+hooks.sums={_target_: myhooks.sums.Sums, up_to: 2, tokens: 4}", "plugins=[myhooks]", "train.eval_every=2",
             "objective.metric=sums/accuracy", "objective.mode=max", "checkpoint.keep_best=1"]  # fmt: skip
    done = start(package, *SMALL, *FEW, f"cache_dir={cache}", *overrides)
    assert done.returncode == 0, done.stderr
    directory = package / "runs" / "run"
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row["split"] == "eval"]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert all(0 <= row["sums/accuracy"] <= 1 and row["loss"] > 0 for row in evaluations)
    assert json.loads((directory / "result.json").read_text())["metrics"]["sums/accuracy"] == evaluations[-1]["sums/accuracy"]
    plain = start(package, *SMALL, *FEW, f"cache_dir={cache}", "exp_name=plain", "train.eval_every=2")
    assert plain.returncode == 0
    others = [json.loads(line) for line in (package / "runs" / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in others] == [row["loss"] for row in rows], "sampling leaves nothing behind in the run"


@pytest.mark.cold
def test_a_users_own_checkpoint_hook_replaces_the_default(package: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    overrides = ["checkpoint._target_=myhooks.saves.Odd", "plugins=[myhooks]"]
    done = start(tmp_path / "elsewhere", *SMALL, *FEW, f"cache_dir={cache}", *overrides, path=package)
    assert done.returncode == 0, done.stderr
    saves = tmp_path / "elsewhere" / "runs" / "run" / "checkpoints"
    assert sorted(os.listdir(saves)) == ["step-00000001", "step-00000003"]
