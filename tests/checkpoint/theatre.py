"""Scenes played in forked processes, one or two, of which one meets with something at a chosen point."""

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState
from scenes import Scene, Stage
from tapped import Change, tapped

from halos.distributed.launch import make_accelerator

PATIENCE = 60  # seconds after which a process that lost its neighbour counts as hanging


class Point:
    """Something that happens at the n-th point, just before a change, or with half of a write written; None counts them."""

    def __init__(self, point: int | None) -> None:
        self.point, self.passed = point, 0

    def __call__(self, change: Change, half: Callable[[], Any] | None) -> None:
        self._pass(change)
        if half is not None:
            if self.passed == self.point:
                half()
            self._pass(change)

    def _pass(self, change: Change) -> None:
        self.passed += 1
        if self.passed - 1 == self.point:
            self.happen(change)

    def happen(self, change: Change) -> None:
        """Dies, or raises."""
        raise NotImplementedError


class Killed(Point):
    def happen(self, change: Change) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Theatre:
    """Plays a scene, `after` which a process may look at what became of it."""

    def __init__(
        self,
        stage: Stage,
        scene: Scene,
        *,
        meets: type[Point] = Killed,
        after: Callable[[Path, Point], None] = lambda run_dir, point: None,
        processes: int = 1,
    ) -> None:
        self.stage, self.scene, self.processes, self.meets, self.after = stage, scene, processes, meets, after
        self.words = stage.place / "words"
        self.whole = self.laid_out("whole")
        assert self.perform(self.whole, 0, None) == [0] * processes, self.words.read_text()
        stage.go_on(scene, self.whole, self.whole)
        self.points = [(rank, point) for rank in range(processes) for point in range(json.loads(self.count(rank).read_text()))]

    def play(self, victim: int, point: int) -> list[int]:
        """Exit statuses of the processes, of which one met with it; what is left is what a resume can use."""
        run_dir = self.laid_out("played")
        statuses = self.perform(run_dir, victim, point)
        assert -signal.SIGALRM not in statuses, f"a process hangs: {self.words.read_text()}"
        self.stage.go_on(self.scene, run_dir, self.whole)
        return statuses

    def laid_out(self, name: str) -> Path:
        run_dir = self.stage.place / name
        shutil.rmtree(run_dir, ignore_errors=True)
        self.stage.lay_out(self.scene, run_dir)
        return run_dir

    def perform(self, run_dir: Path, victim: int, point: int | None) -> list[int]:
        store = self.stage.place / "store"
        for path in (store, self.words):
            path.unlink(missing_ok=True)
        pids = [self.fork(rank, run_dir, store, point if rank == victim else None) for rank in range(self.processes)]
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    def fork(self, rank: int, run_dir: Path, store: Path, point: int | None) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            signal.alarm(PATIENCE)
            with self.words.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if self.processes > 1:
                self.join(rank, store)
            met = self.meets(point)
            with tapped(run_dir, met):
                self.stage.act(self.scene, run_dir)
            self.count(rank).write_text(json.dumps(met.passed))
            self.after(run_dir, met)
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(1)

    def join(self, rank: int, store: Path) -> None:
        """Two gloo processes, as a launcher would have made them."""
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # accelerate asks for them; they meet in `store`
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=self.processes)
        AcceleratorState._reset_state(reset_partial_state=True)
        run = self.stage.trainer.run
        run.accelerator = make_accelerator(run.config.train.precision, run.config.model.dtype)

    def count(self, rank: int) -> Path:
        return self.stage.place / f"points-{rank}"
