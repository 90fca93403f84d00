"""A hook that sends a signal, or raises, at a chosen moment of a run; loaded with plugins=[sabotage]."""

import os
import signal
from pathlib import Path
from typing import Annotated, Any, Literal

from halos.hooks.base import Hook, Run
from halos.types import Range


class Sabotage(Hook):
    def __init__(
        self,
        *,
        moment: Literal["start", "step", "eval", "save"],
        step: Annotated[int, Range(least=0)],
        rank: Annotated[int, Range(least=0)],
        whom: Literal["self", "launcher"],
        deed: Literal["SIGINT", "SIGTERM", "SIGUSR1", "SIGKILL", "raise"],
    ) -> None:
        self.moment, self.step, self.rank, self.whom, self.deed = moment, step, rank, whom, deed

    def on_start(self, run: Run) -> None:
        self._maybe(run, "start")

    def on_step(self, run: Run, metrics: Any) -> None:
        self._maybe(run, "step")

    def on_eval(self, run: Run, metrics: Any) -> None:
        self._maybe(run, "eval")

    def on_save(self, run: Run, path: Path, *, final: bool) -> None:
        self._maybe(run, "save")

    def _maybe(self, run: Run, moment: str) -> None:
        if (moment, run.step, run.accelerator.process_index) != (self.moment, self.step, self.rank):
            return
        mark = run.directory.path / f"sabotage-{moment}"
        if mark.exists():
            return  # once is enough: the run goes on
        mark.touch()
        if self.deed == "raise":
            raise ValueError("sabotage: this is the error that people must see")
        os.kill(os.getpid() if self.whom == "self" else os.getppid(), getattr(signal, self.deed))
