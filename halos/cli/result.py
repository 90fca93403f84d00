"""What became of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halos.distributed.signals import STOPPED
from halos.rundir import RunDir

Status = Literal["finished", "stopped", "failed", "checked"]
NAMES: dict[int, Status] = {0: "finished", STOPPED: "stopped"}


@dataclass(frozen=True, slots=True)
class Result:
    """`status` is `checked` of a dry run, which trains nothing."""

    status: Status
    exit_status: int  # what the command would have ended with
    run_dir: Path
    step: int
    metrics: Mapping[str, float]  # of the last evaluation
    reason: str | None  # why it was stopped, or failed

    @property
    def final(self) -> Path | None:
        """The directory that from_pretrained loads; None where there is none yet."""
        directory = RunDir(self.run_dir).final
        return directory if directory.is_dir() else None

    @classmethod
    def of(cls, run_dir: str, exit_status: int, *, dry: bool) -> Result:
        left = (None if dry else RunDir(run_dir).read_result()) or {}
        status: Status = "checked" if dry and not exit_status else NAMES.get(exit_status, "failed")
        return cls(status, exit_status, Path(run_dir), left.get("step", 0), left.get("metrics", {}), left.get("reason"))
