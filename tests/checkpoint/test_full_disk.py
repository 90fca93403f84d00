"""A disk that fills costs the save that found it full, and nothing else; the last save of all fails loudly."""

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from crash_harness import CrashHarness, FaultPoint
from fs_recorder import Change, recording
from save_scenarios import LAST, SCENARIOS, Scenario, TrainedRun

import train
from halos.checkpoint import commit, manifest, preflight, select
from halos.config.schema import Config
from halos.errors import UserError
from halos.run.lifecycle import run
from halos.rundir import RunDir
from halos.trainers.base import Trainer

Configure = Callable[..., Config]
WORDS = ["loss=sft", "train.steps=6", "train.batch_size=8", "checkpoint.every=2", "checkpoint.keep_last=3", "optim.lr=1e-3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> TrainedRun:
    return TrainedRun("lora", tmp_path_factory.mktemp("full"), cache)


class Full(FaultPoint):
    """From the n-th change that needs room on there is none, until something is deleted."""

    full = False

    def __call__(self, change: Change, half: Callable[[], Any] | None) -> None:
        if change.kind in ("unlink", "rmdir"):
            self.full = False
        elif self.full and change.kind != "fsync":
            self.happen(change)
        elif change.kind in ("open", "write", "mkdir", "rename", "fsync"):
            super().__call__(change, half)

    def happen(self, change: Change) -> None:
        self.full = True
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def harness(trained: TrainedRun, scenario: Scenario, processes: int) -> CrashHarness:
    """After the scenario, in each process: nothing half-written is left, and with room again the save succeeds."""

    def after(run_dir: Path, point: FaultPoint) -> None:
        trainer = trained.trainer
        trainer.run.accelerator.wait_for_everyone()
        names = [path.name for path in run_dir.rglob(commit.HIDDEN + "*")]
        assert [name for name in names if not name.startswith(commit.HIDDEN + "old-")] == []
        trainer.run.accelerator.wait_for_everyone()
        assert trainer.run.stop is None
        trainer.run.failure = None
        scenario.action(trainer)
        assert trainer.run.failure is None
        last = trainer.run.directory.final if scenario.finals else run_dir / "checkpoints" / select.name_of(LAST)
        assert manifest.verify(last) == []

    return CrashHarness(trained, scenario, fault=Full, after=after, processes=processes)


def fill(harness: CrashHarness, number: int | None) -> None:
    points = harness.points if number is None else random.Random(0).sample(harness.points, number)
    for victim, point in points:
        assert harness.run(victim, point) == [0] * harness.processes, harness.output.read_text()


@pytest.mark.parametrize(("scenario", "processes"), [(SCENARIOS[2], 1), (SCENARIOS[5], 1), (SCENARIOS[2], 2)])
def test_a_disk_that_fills_anywhere_in_a_save_costs_only_that_save(
    trained: TrainedRun, scenario: Scenario, processes: int
) -> None:
    fill(harness(trained, scenario, processes), 5)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "processes"), [(SCENARIOS[2], 1), (SCENARIOS[5], 1), (SCENARIOS[2], 2), (SCENARIOS[5], 2)])
def test_a_disk_that_fills_at_any_point_of_a_save(trained: TrainedRun, scenario: Scenario, processes: int) -> None:
    fill(harness(trained, scenario, processes), None)


# --- what becomes of the run -------------------------------------------------------------------------------------------


@contextmanager
def no_room_for(directory: Path) -> Iterator[None]:
    """Writes into what is to become `directory` fail."""

    def refuse(change: Change, half: Callable[[], Any] | None) -> None:
        if change.kind == "write" and commit.HIDDEN + directory.name in change.path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with recording(directory.parents[1], refuse):
        yield


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


def steps(run_dir: Path) -> list[int]:
    return [select.step_of(path) for path in select.checkpoints(run_dir / "checkpoints")]


def test_by_default_a_run_warns_and_goes_on(configure: Configure, tmp_path: Path) -> None:
    with no_room_for(tmp_path / "run" / "checkpoints" / select.name_of(4)):
        assert run(configure(*WORDS), []) == 0
    assert (
        "THE DISK IS FULL: the checkpoint of step 4 was not saved, and the newest checkpoint is of step 2"
        in (tmp_path / "run" / "train.log").read_text()
    )
    assert steps(tmp_path / "run") == [2, 6]
    assert result(tmp_path / "run")["status"] == "finished"


def test_a_run_can_stop_when_the_disk_is_full_and_be_resumed(configure: Configure, tmp_path: Path) -> None:
    assert run(configure(*WORDS, "exp_name=whole"), []) == 0
    with no_room_for(tmp_path / "run" / "checkpoints" / select.name_of(4)):
        assert run(configure(*WORDS, "checkpoint.on_full_disk=stop"), []) == 1
    assert result(tmp_path / "run")["status"] == "stopped"
    assert "THE DISK IS FULL" in result(tmp_path / "run")["reason"]
    assert (steps(tmp_path / "run"), (tmp_path / "run" / "FINAL").exists()) == ([2], False)
    assert train.start([f"resume={tmp_path / 'run'}"]) == 0
    mine, whole = ((tmp_path / name / "FINAL" / "model.safetensors").read_bytes() for name in ("run", "whole"))
    assert mine == whole


def test_a_start_that_finds_no_room_says_where(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "config.yaml"))

    monkeypatch.setattr(RunDir, "write_config", full)
    with pytest.raises(UserError, match=r"no space is left for .*run/config.yaml: free some, and resume"):
        run(configure(*WORDS), [])
    monkeypatch.undo()
    assert run(configure(*WORDS), []) == 0, "nothing stands in the way of the next start"


@pytest.mark.parametrize("policy", ["warn", "stop"])
def test_a_last_save_that_finds_no_room_fails_the_run(policy: str, configure: Configure, tmp_path: Path) -> None:
    with no_room_for(tmp_path / "run" / "checkpoints" / "FINAL"):
        assert run(configure(*WORDS, f"checkpoint.on_full_disk={policy}"), []) == 1
    assert result(tmp_path / "run")["status"] == "failed"
    assert "FINAL was not saved, and the newest checkpoint is of step 6" in result(tmp_path / "run")["reason"]
    assert train.start([f"resume={tmp_path / 'run'}"]) == 0
    assert manifest.verify(tmp_path / "run" / "FINAL") == []


def test_a_signal_whose_save_finds_no_room_is_no_clean_stop(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def interrupted(self: Trainer, indices: Any) -> Any:
        self.run.stop_requested = "SIGTERM" if self.run.step == 2 else None
        return step(self, indices)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with no_room_for(tmp_path / "run" / "checkpoints" / select.name_of(3)):
        assert run(configure(*WORDS), []) == 1
    assert result(tmp_path / "run")["status"] == "failed"
    assert steps(tmp_path / "run") == [2]


@pytest.fixture
def no_least_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's own check of output_root lets anything through."""
    monkeypatch.setattr("halos.config.paths.MIN_FREE", 0)


@pytest.fixture
def small_disk(tmp_path: Path, no_least_room: None) -> Iterator[Path]:
    """16 MiB: a checkpoint of the tiny model takes 7.5."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", place], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield place
    # lazily: train.log is open
    subprocess.run(["umount", "-l", place], check=True)


def test_on_a_disk_that_is_really_full(small_disk: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*WORDS, "train.steps=8", f"output_root={small_disk}", "checkpoint.on_full_disk=stop"]
    with pytest.raises(UserError, match="free, and this run needs about"):
        run(configure(*overrides, "exp_name=refused"), [])
    monkeypatch.setattr(preflight, "too_little_space", lambda *_: None)
    assert run(configure(*overrides), []) == 1
    assert steps(small_disk / "run") == [2, 4]
    assert list((small_disk / "run").rglob(commit.HIDDEN + "*")) == []
    assert result(small_disk / "run")["status"] == "stopped"
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert train.start([f"resume={small_disk / 'run'}"]) == 0
    assert all(
        manifest.verify(path) == []
        for path in [*select.checkpoints(small_disk / "run" / "checkpoints"), small_disk / "run" / "FINAL"]
    )


# --- before the first step ---------------------------------------------------------------------------------------------


def test_a_disk_too_small_for_the_run_is_refused_before_step_one(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_least_room: None
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"has 1.0 MiB free, and this run needs about [\d.]+ MiB: 3 checkpoints of [\d.]+ MiB"):
        run(configure(*WORDS), [])
    assert not (tmp_path / "run" / "config.yaml").exists()  # nothing stands in the way of the command, mended
    monkeypatch.undo()
    assert run(configure(*WORDS), []) == 0


@pytest.mark.parametrize("peft", [[], ["peft=lora"]])
def test_the_estimate_of_a_checkpoint_and_of_final_is_what_they_take(
    peft: list[str], configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    monkeypatch.setattr("halos.checkpoint.space.too_little", lambda _, **sizes: seen.update(sizes))
    assert run(configure(*WORDS, *peft), []) == 0
    places = {"one": tmp_path / "run" / "checkpoints" / select.name_of(6), "final": tmp_path / "run" / "FINAL"}
    for name, path in places.items():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        assert size <= seen[name] <= 1.2 * size + 2**19
