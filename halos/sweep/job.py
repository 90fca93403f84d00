"""One job of a sweep: what was typed for it, where it lies, and how far it is by the files it writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from halos import confined
from halos.distributed.children import tail
from halos.errors import UserError
from halos.metrics_file import row_of
from halos.rundir import RunDir, is_run

State = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Job:
    """`words` are all its overrides, `told` those that only it has."""

    number: int
    words: tuple[str, ...]
    told: str
    path: Path  # its run directory
    log: Path  # what its processes print

    @property
    def run(self) -> RunDir:
        return RunDir(self.path)

    def is_done(self) -> bool:
        """Whether an earlier start has finished it, and nobody asks for it anew."""
        if "overwrite=true" in [word.lstrip("+").lower() for word in self.words]:
            return False
        return is_run(self.path) and self.run.is_finished() and self.run.final.is_dir()

    def objective(self) -> float | None:
        """Its objective's last held-out value, for the sweeper; None where it has none."""
        if not self.run.is_finished():
            return None
        settings = confined.parse_yaml(self.run.read_config(), str(self.run.config))
        return self.run.final_metric(str(settings["objective"]["metric"]))


@dataclass(frozen=True, slots=True)
class Progress:
    step: int
    total: int | None  # unknown until it has begun
    loss: float | None


def progress(job: Job) -> Progress:
    """How far a job is. Reads ends of files only, since it is asked for every second."""
    row: dict[str, Any] = {}
    for line in reversed(tail(job.path / "metrics.jsonl").splitlines()):
        found = row_of(line.encode("utf-8", errors="replace"))
        if found is not None and found.get("split") == "train":
            row = found
            break
    attempts = job.run.attempts()
    return Progress(int(row.get("step") or 0), _total(attempts[-1]) if attempts else None, row.get("loss"))


@cache
def _total(attempt: Path) -> int | None:
    try:
        record = confined.parse_yaml(confined.read_text(attempt, most=confined.SETTINGS), attempt.name)
    except UserError:
        return None
    total = record.get("total_steps") if isinstance(record, dict) else None
    return total if type(total) is int else None


def distinct_overrides(jobs: Sequence[Sequence[str]]) -> list[str]:
    """What tells each job from the others, as it was typed; all of it where there is one job."""
    if len(jobs) == 1:
        return [" ".join(jobs[0])]
    shared = set(jobs[0]).intersection(*jobs[1:])
    return [" ".join(word.lstrip("+") for word in words if word not in shared) or f"job {n}" for n, words in enumerate(jobs)]
