"""Runs a save scenario in one or two forked ranks, of which one is killed, or finds the disk full, at a chosen operation."""

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
from fs_recorder import Change, recording
from save_scenarios import Scenario, TrainedRun

from halos.distributed.launch import make_accelerator

PATIENCE = 60  # seconds after which a rank whose neighbour died counts as hanging


class FaultPoint:
    """Raises or dies at the n-th point: just before a change to the file system, or after half of a write. None counts points."""

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
        """Die or raise."""
        raise NotImplementedError


class Killed(FaultPoint):
    def happen(self, change: Change) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class CrashHarness:
    """Runs a scenario with a fault at any point; `after` is called in each rank that survives."""

    def __init__(
        self,
        trained: TrainedRun,
        scenario: Scenario,
        *,
        fault: type[FaultPoint] = Killed,
        after: Callable[[Path, FaultPoint], None] = lambda run_dir, point: None,
        processes: int = 1,
    ) -> None:
        self.trained, self.scenario, self.processes, self.fault, self.after = trained, scenario, processes, fault, after
        self.output = trained.directory / "output"
        self.whole = self.prepared("whole")
        assert self.run_ranks(self.whole, 0, None) == [0] * processes, self.output.read_text()
        trained.check_resume(scenario, self.whole, self.whole)
        self.points = [(rank, point) for rank in range(processes) for point in range(json.loads(self.count(rank).read_text()))]

    def run(self, victim: int, point: int) -> list[int]:
        """Return the exit statuses of the ranks, one of which has the fault; check that a resume can use what is left."""
        run_dir = self.prepared("faulty")
        statuses = self.run_ranks(run_dir, victim, point)
        assert -signal.SIGALRM not in statuses, f"a rank hangs: {self.output.read_text()}"
        self.trained.check_resume(self.scenario, run_dir, self.whole)
        return statuses

    def prepared(self, name: str) -> Path:
        run_dir = self.trained.directory / name
        shutil.rmtree(run_dir, ignore_errors=True)
        self.trained.prepare_directory(self.scenario, run_dir)
        return run_dir

    def run_ranks(self, run_dir: Path, victim: int, point: int | None) -> list[int]:
        store = self.trained.directory / "store"
        for path in (store, self.output):
            path.unlink(missing_ok=True)
        pids = [self.fork(rank, run_dir, store, point if rank == victim else None) for rank in range(self.processes)]
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    def fork(self, rank: int, run_dir: Path, store: Path, point: int | None) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            signal.alarm(PATIENCE)
            with self.output.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if self.processes > 1:
                self.join(rank, store)
            point = self.fault(point)
            with recording(run_dir, point):
                self.trained.run_scenario(self.scenario, run_dir)
            self.count(rank).write_text(json.dumps(point.passed))
            self.after(run_dir, point)
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(1)

    def join(self, rank: int, store: Path) -> None:
        """Join a gloo group as a launched rank would."""
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # accelerate asks for them; the ranks meet in `store`
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=self.processes)
        AcceleratorState._reset_state(reset_partial_state=True)
        run = self.trained.trainer.run
        run.accelerator = make_accelerator(run.config.train.precision, run.config.model.dtype)

    def count(self, rank: int) -> Path:
        return self.trained.directory / f"points-{rank}"
