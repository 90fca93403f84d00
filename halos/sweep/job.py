"""One job of a sweep: its overrides, its directory, and its progress according to the files that it writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from halos import confined
from halos.config.run_config import recorded_content
from halos.distributed.children import tail
from halos.errors import UserError
from halos.metrics_file import row_of
from halos.rundir import RunDir, is_run

State = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Job:
    """`label` holds the overrides that not all jobs have."""

    number: int
    overrides: tuple[str, ...]
    label: str
    path: Path  # its run directory
    log: Path  # output of its processes
    asks_no_more: bool = True  # than the run in `path`, if that is finished: its settings are those of now

    @property
    def run(self) -> RunDir:
        return RunDir(self.path)

    def is_done(self) -> bool:
        """Return whether an earlier start has finished what it asks for. A job with code of the user's is never done by its files
        alone: its process compares the code."""
        if not self.asks_no_more or not is_run(self.path) or not self.run.is_finished() or not self.run.final.is_dir():
            return False
        try:
            content = recorded_content(self.run.read_attempts(), str(self.path))
        except UserError:
            return False  # a record is damaged, which its process reports
        return content is None or not content.has_own_code()

    def objective(self) -> float | None:
        """Return the last value of its objective on the evaluation data, for the sweeper; None where it has none."""
        if not self.run.is_finished():
            return None
        settings = confined.parse_yaml(self.run.read_config(), str(self.run.config))
        return self.run.final_metric(str(settings["objective"]["metric"]))


@dataclass(frozen=True, slots=True)
class Progress:
    step: int
    total: int | None  # unknown until it has started
    loss: float | None


def progress(job: Job) -> Progress:
    """Return the progress of a job. It reads only the ends of files, since it is called every second."""
    row: dict[str, Any] = {}
    for line in reversed(tail(job.path / "metrics.jsonl").splitlines()):
        parsed = row_of(line.encode("utf-8", errors="replace"))
        if parsed is not None and parsed.get("split") == "train":
            row = parsed
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
    """Return for each job the overrides that not all jobs share; all of them where there is one job."""
    if len(jobs) == 1:
        return [" ".join(jobs[0])]
    shared = set(jobs[0]).intersection(*jobs[1:])
    return [
        " ".join(override.lstrip("+") for override in overrides if override not in shared) or f"job {n}"
        for n, overrides in enumerate(jobs)
    ]
