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
    """The README's example, in a directory of its own."""
    [(name, code)] = re.findall(
        r"```python\n# (myhooks/[\w/]+\.py)\n(.*?)```", (ROOT / "halos" / "hooks" / "README.md").read_text(), re.S
    )
    place = tmp_path / "place"
    (place / name).parent.mkdir(parents=True)
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


@pytest.mark.cold
def test_a_checkpoint_hook_of_the_users_own_replaces_ours(package: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    words = ["checkpoint._target_=myhooks.saves.Odd", "plugins=[myhooks]"]
    done = start(tmp_path / "elsewhere", *SMALL, *FEW, f"cache_dir={cache}", *words, path=package)
    assert done.returncode == 0, done.stderr
    saves = tmp_path / "elsewhere" / "runs" / "run" / "checkpoints"
    assert sorted(os.listdir(saves)) == ["step-00000001", "step-00000003"]
