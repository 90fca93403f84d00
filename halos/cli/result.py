"""The outcome of a run, as `halos.train` returns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halos.distributed.signals import STOPPED
from halos.rundir import RunDir

Status = Literal["finished", "stopped", "failed", "checked"]
STATUS_OF: dict[int, Status] = {0: "finished", STOPPED: "stopped"}


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a run. `status` is `checked` for a dry run, and `failed` for every exit status but those of STATUS_OF: also
    where a hook or a full disk stopped the run, which result.json calls `stopped`."""

    status: Status
    exit_status: int  # of the command
    run_dir: Path
    step: int
    metrics: Mapping[str, float]  # of the last evaluation
    reason: str | None  # why it stopped or failed

    @property
    def final(self) -> Path | None:
        """The directory of the final model, for from_pretrained; None if it does not exist."""
        directory = RunDir(self.run_dir).final
        return directory if directory.is_dir() else None

    @classmethod
    def of(cls, run_dir: str, exit_status: int, *, dry: bool) -> Result:
        result = (None if dry else RunDir(run_dir).read_result()) or {}
        status: Status = "checked" if dry and not exit_status else STATUS_OF.get(exit_status, "failed")
        return cls(status, exit_status, Path(run_dir), result.get("step", 0), result.get("metrics", {}), result.get("reason"))
