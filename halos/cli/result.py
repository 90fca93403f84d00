"""The outcome of a run, as `halos.train` returns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from halos.distributed.signals import STOPPED
from halos.rundir import RunDir

Ended = Literal["finished", "stopped", "failed"]
STATUS_OF: dict[int, Ended] = {0: "finished", STOPPED: "stopped"}  # of a run that left no result.json


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a run. `status` is that of result.json, or `checked` for a dry run that succeeded."""

    status: Ended | Literal["checked"]
    exit_status: int  # of the command
    run_dir: Path
    step: int
    metrics: Mapping[str, float]  # of the last evaluation; empty without one (data.eval=[])
    reason: str | None  # why it stopped or failed

    @property
    def final(self) -> Path | None:
        """The directory of the final model, for from_pretrained; None if it does not exist."""
        directory = RunDir(self.run_dir).final
        return directory if directory.is_dir() else None

    @classmethod
    def of(cls, run_dir: str, exit_status: int, *, dry: bool) -> Result:
        result = (None if dry else RunDir(run_dir).read_result()) or {}
        ended = result.get("status") if result.get("status") in get_args(Ended) else STATUS_OF.get(exit_status, "failed")
        status = "checked" if dry and not exit_status else ended
        return cls(status, exit_status, Path(run_dir), result.get("step", 0), result.get("metrics", {}), result.get("reason"))
