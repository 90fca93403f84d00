"""A save that is killed anywhere, also half-way through a write, loses at most itself."""

import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState
from scenes import LAST, SCENES, Scene, Stage, same, snapshot
from tapped import Change, tapped

from halos.build.processes import accelerator
from halos.checkpoint import find

PATIENCE = 60  # seconds after which a process that lost its neighbour counts as hanging


@pytest.fixture(scope="module", params=["full", "lora"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Stage:
    return Stage(request.param, tmp_path_factory.mktemp(request.param), cache)


class Killer:
    """Ends the process at the n-th point: just before a change, or with half of a write written."""

    def __init__(self, point: int | None) -> None:
        self.point, self.passed = point, 0

    def __call__(self, change: Change, half: Callable[[], Any] | None) -> None:
        self._pass()
        if half is not None:
            if self.passed == self.point:
                half()
            self._pass()

    def _pass(self) -> None:
        if self.passed == self.point:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1


class Theatre:
    """Runs a scene in forked processes, in one or in two, and kills one of them."""

    def __init__(self, stage: Stage, scene: Scene, *, processes: int = 1) -> None:
        self.stage, self.scene, self.processes = stage, scene, processes
        self.words = stage.place / "words"
        self.whole = self.laid_out("whole")
        assert self.perform(self.whole, 0, None) == [0] * processes, self.words.read_text()
        stage.go_on(scene, self.whole, self.whole)
        self.points = [(rank, point) for rank in range(processes) for point in range(json.loads(self.count(rank).read_text()))]

    def kill(self, rank: int, point: int) -> None:
        """One process at one point; what is left of the run must be what a resume can use."""
        run_dir = self.laid_out("killed")
        statuses = self.perform(run_dir, rank, point)
        assert statuses[rank] == -signal.SIGKILL, self.words.read_text()
        assert all(status == 1 for other, status in enumerate(statuses) if other != rank), f"the others hang: {statuses}"
        self.stage.go_on(self.scene, run_dir, self.whole)

    def laid_out(self, name: str) -> Path:
        run_dir = self.stage.place / name
        shutil.rmtree(run_dir, ignore_errors=True)
        self.stage.lay_out(self.scene, run_dir)
        return run_dir

    def perform(self, run_dir: Path, victim: int, point: int | None) -> list[int]:
        """Exit statuses of the processes."""
        store = self.stage.place / "store"
        store.unlink(missing_ok=True)
        pids = [self.fork(rank, run_dir, store, point if rank == victim else None) for rank in range(self.processes)]
        statuses: dict[int, int] = {}
        until = time.monotonic() + PATIENCE
        while len(statuses) < len(pids):
            for pid in set(pids) - statuses.keys():
                if time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, 0 if self.processes == 1 else os.WNOHANG)
                if ended:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0 if self.processes == 1 else 0.005)
        return [statuses[pid] for pid in pids]

    def fork(self, rank: int, run_dir: Path, store: Path, point: int | None) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            with self.words.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if self.processes > 1:
                self.join(rank, store)
            killer = Killer(point)
            with tapped(run_dir, killer):
                self.stage.act(self.scene, run_dir)
            self.count(rank).write_text(json.dumps(killer.passed))
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(1)

    def join(self, rank: int, store: Path) -> None:
        """Two gloo processes, as a launcher would have made them."""
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
        }
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=self.processes)
        AcceleratorState._reset_state(reset_partial_state=True)
        run = self.stage.trainer.run
        run.accelerator = accelerator(run.config.train.precision, run.config.model.dtype)

    def count(self, rank: int) -> Path:
        return self.stage.place / f"points-{rank}"


def kill_some(theatre: Theatre, number: int) -> None:
    for rank, point in random.Random(theatre.scene.name).sample(theatre.points, number):
        theatre.kill(rank, point)


def kill_all(theatre: Theatre, record: Callable[[str, Any], None]) -> None:
    for rank, point in theatre.points:
        theatre.kill(rank, point)
    record("points", len(theatre.points))


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_save_that_is_killed_loses_at_most_itself(stage: Stage, scene: Scene) -> None:
    kill_some(Theatre(stage, scene), 3)


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_save_that_is_killed_at_any_point(stage: Stage, scene: Scene, record_property: Callable[[str, Any], None]) -> None:
    kill_all(Theatre(stage, scene), record_property)


SHARED = [scene for scene in SCENES if scene.shared]


@pytest.mark.parametrize("scene", SHARED[1:2], ids=lambda scene: scene.name)
def test_a_save_of_two_processes_of_which_one_is_killed(stage: Stage, scene: Scene) -> None:
    kill_some(Theatre(stage, scene, processes=2), 6)


@pytest.mark.slow
@pytest.mark.parametrize("scene", SHARED, ids=lambda scene: scene.name)
def test_a_save_of_two_processes_of_which_one_is_killed_at_any_point(
    stage: Stage, scene: Scene, record_property: Callable[[str, Any], None]
) -> None:
    kill_all(Theatre(stage, scene, processes=2), record_property)


def test_what_a_scene_counts_as_whole_is_what_a_resume_needs(stage: Stage) -> None:
    """Every killed run is compared with these checkpoints; here they are resumed from, and trained on from."""
    by_two = Theatre(stage, SCENES[1], processes=2).whole
    for source, step in [(stage.shelf, LAST - 1), (stage.shelf, LAST), (by_two, LAST)]:
        run_dir = stage.place / "resumed"
        shutil.rmtree(run_dir, ignore_errors=True)
        others = [find.name_of(other) for other in range(LAST + 1) if other != step]
        shutil.copytree(source, run_dir, ignore=shutil.ignore_patterns("FINAL", "older", *others))
        trainer = stage.resumed(run_dir)
        assert same(snapshot(trainer.run), stage.known[step])
        if step < LAST:
            trainer.step(trainer.order.batch(step))
            assert same(snapshot(trainer.run)["weights"], stage.known[step + 1]["weights"])
