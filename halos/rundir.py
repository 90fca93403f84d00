"""The directory of one run: the paths in it, and the small files that record its progress, which only rank 0 writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from halos import confined, seals
from halos.config.schema import Scope, keys_of
from halos.config.values import as_argument
from halos.confined import write_whole
from halos.errors import UserError
from halos.journal import Journal
from halos.lock import NAME as LOCK
from halos.lock import RunLock
from halos.metrics_file import MetricsFile, to_json
from halos.repository import COMMAND
from halos.result_file import ResultFile, Status

REPORT = "forward_report.json"  # what a start proved of the forward pass
DRY_RUN = "dry_run.html"  # of a dry run here, which is no start
# files that a start may leave if it dies before it has written config.yaml
LEFTOVERS = {"attempts", "train.log", "metrics.jsonl", "result.json", REPORT, LOCK, DRY_RUN}
SUPERSEDED = "superseded-"
COMMITS = "checkpoints.jsonl"
NOT_IN_JOB_NAMES = keys_of(Scope.PLACE, Scope.HOST, Scope.COMMAND)
HIDDEN = (".config.yaml.", ".result.json.", f".{DRY_RUN}.", f".{REPORT}.", f".{LOCK}.", ".deleted-", "train.rank")


class RunDir:
    """A run's directory. Creating the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "FINAL"

    def log_of(self, rank: int) -> Path:
        """Return the path of a rank's log: train.log is rank 0's."""
        return self.path / (f"train.rank{rank}.log" if rank else "train.log")

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> MetricsFile:
        return MetricsFile(self.path / "metrics.jsonl")

    @property
    def result(self) -> ResultFile:
        return ResultFile(self.path)

    @property
    def commits(self) -> Journal:
        """The record of every durable checkpoint, outside checkpoints/, so that one that was deleted is still known."""
        return Journal(self.path / COMMITS)

    def lock(self) -> RunLock:
        return RunLock(self.path / LOCK)

    # --- starting and resuming

    def refuse_occupied(self, *, overwrite: bool) -> None:
        """Raises UserError if a new run cannot start here; changes nothing."""
        other = "choose another exp_name"
        if is_run(self.path.parent):
            raise UserError(f"{self.path.parent} is a run already, so nothing else can lie in it: {other}")
        if is_run(self.path) and not self.is_finished():
            raise UserError(
                f"{self.path} holds a run that is not finished: {COMMAND} {as_argument('resume', self.path)} continues it;"
                f" to start again delete the directory, or {other}"
            )
        if is_run(self.path) and not overwrite:
            raise UserError(f"{self.path} holds a finished run: overwrite=true deletes it, or {other}")
        if is_run(self.path) and Path.cwd().is_relative_to(self.path.resolve()):
            raise UserError(f"overwrite=true would delete {self.path.resolve()}, which you are in: change directory, or {other}")
        if is_run(self.path):
            return
        if (self.path / "multirun.yaml").is_file() or _runs_in(self.path):
            raise UserError(f"{self.path} holds a sweep, and a single run cannot share its name: {other}")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: {other} or run_dir")
        if foreign := [name for name in sorted(self._names()) if name not in LEFTOVERS and not name.startswith(HIDDEN)]:
            raise UserError(f"{self.path} is not empty and is not a run ({foreign[0]} is in it): {other} or run_dir")

    def create(self, *, overwrite: bool) -> None:
        """Create the directory of a new run, and delete an older run in it except for its lock. Raises UserError if it cannot.

        Whenever this crashes, a finished run or no run is left, and a new run can replace either.
        """
        self.refuse_occupied(overwrite=overwrite)
        doomed = self.path / f".deleted-{os.getpid()}"
        confined.remove(doomed)
        names = [name for name in self._names() if name not in (LOCK, DRY_RUN) and not name.startswith(f".{LOCK}.")]
        doomed.mkdir(parents=True)
        last = ["config.yaml", "attempts", "result.json"]
        for name in sorted(names, key=lambda name: last.index(name) if name in last else -1):
            (self.path / name).rename(doomed / name)
        confined.remove(doomed)
        (self.path / "attempts").mkdir()

    def remove_refused_start(self) -> None:
        """Remove a start that was refused before its first step, so that the corrected command can start in its place."""
        if self.checkpoints.is_dir() or self.final.exists() or any(row["step"] for row in self.read_metrics()):
            return
        started = is_run(self.path)  # in an empty directory, so that everything here but the lock is of this start
        for name in self._names():
            if name not in (LOCK, DRY_RUN) and (started or name in LEFTOVERS or name.startswith(HIDDEN)):
                confined.remove(self.path / name)

    @classmethod
    def of_resume(cls, resume: str) -> Self:
        """Return the run that `resume=` names, by its directory or by one of its checkpoints (RUN/checkpoints/step-N)."""
        path = Path(resume)
        if path.parent.parent.name == "checkpoints" and path.parent.name.startswith(SUPERSEDED):
            raise UserError(
                f"resume={resume}: this checkpoint was set aside; to resume from it move it back into {path.parent.parent}"
                " and name it there"
            )
        return cls(path.parent.parent if path.parent.name == "checkpoints" else path)

    def require_run(self) -> None:
        """Raises UserError if there is no run here that could be resumed, or if a link in it leads out of it."""
        if not is_run(self.path):
            raise UserError(f"resume={self.path}: {_why_no_run(self.path)}")
        confined.inspect(self.path)
        for path in (self.checkpoints, self.final):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path} is a file where a directory belongs: move it away")

    def requested_checkpoint(self, resume: str | None) -> Path | None:
        """Return the checkpoint that `resume=` names; None if it names the run only."""
        if resume is None or Path(resume).parent.name != "checkpoints":
            return None
        checkpoint = self.checkpoints / Path(resume).name
        existing = self.checkpoints_by_step().values()
        if checkpoint not in existing:
            names = ", ".join(path.name for path in existing)
            raise UserError(f"resume={resume}: there is no such checkpoint; there are {names or 'none'}")
        return checkpoint

    def checkpoints_by_step(self) -> dict[int, Path]:
        """Return the checkpoints by step, oldest first, complete or not."""
        entries = self.checkpoints.glob("step-*")
        paths = [path for path in entries if path.name[5:].isdecimal() and len(path.name) < 20 and path.is_dir()]
        return {step_of(path): path for path in sorted(paths, key=step_of)}

    def set_aside(self, step: int, *, final: bool) -> tuple[Path, list[str]]:
        """Move checkpoints after `step`, and with `final` FINAL, into checkpoints/superseded-NNN/; NNN is the coming attempt.

        Copies their lines of metrics.jsonl there too. The newest moves first, so that a crash in between leaves a run without
        its newest checkpoints, but without a gap. Returns that directory and the names of what was moved.
        """
        directory = self.checkpoints / f"{SUPERSEDED}{self.next_attempt():03d}"
        later = [path for number, path in reversed(self.checkpoints_by_step().items()) if number > step]
        moved = [*later, *([self.final] if final and self.final.exists() else [])]
        if moved:
            if directory.exists() and not directory.is_dir():
                confined.remove(directory)  # nothing else has such a name
            directory.mkdir(parents=True, exist_ok=True)
            rows = [row for row in self.read_metrics() if row["step"] > step]
            write_whole(directory / "metrics.jsonl", "".join(to_json(row) + "\n" for row in rows), within=self.path)
        for path in moved:
            path.rename(directory / path.name)
        return directory, [path.name for path in moved]

    # --- config.yaml and attempts/

    def write_config(self, text: str) -> None:
        """Write config.yaml, once."""
        assert not self.config.exists(), "a run's configuration is written once"
        write_whole(self.config, text)

    def read_config(self) -> str:
        """Read the text of config.yaml. Raises UserError if it is not readable text."""
        return confined.read_text(self.config, within=self.path, most=confined.SETTINGS)

    def attempts(self) -> list[Path]:
        """Return the paths of the records of starts, oldest first."""
        paths = [path for path in (self.path / "attempts").glob("*.yaml") if path.stem.isdecimal() and len(path.stem) < 10]
        return sorted(paths, key=lambda path: int(path.stem))

    def next_attempt(self) -> int:
        return 1 + int(self.attempts()[-1].stem) if self.attempts() else 0

    def start_attempt(self, record: Mapping[str, Any]) -> int:
        """Write attempts/NNN.yaml (overrides, versions, where the run resumed and why), and return NNN."""
        number = self.next_attempt()
        (self.path / "attempts").mkdir(parents=True, exist_ok=True)
        before = [*self.read_attempts().values()][-1:]
        text = seals.attempt(record, config=self.read_config(), before=before[0] if before else None)
        write_whole(self.path / "attempts" / f"{number:03d}.yaml", text, within=self.path)
        return number

    def read_attempts(self) -> dict[str, str]:
        """Read the text of each record by its file name, oldest first."""
        return {path.name: confined.read_text(path, within=self.path, most=confined.SETTINGS) for path in self.attempts()}

    # --- metrics and result

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; the row has a `step`."""
        self.metrics.append(row)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read all rows of metrics.jsonl that are not damaged."""
        return self.metrics.read()

    def truncate_metrics(self, step: int) -> int:
        """Drop the lines logged after `step`, from which the run resumes; return how many lines were damaged."""
        return self.metrics.keep_until(step)

    @property
    def bad_rows(self) -> Path:
        """The data rows of every skipped step, and of every evaluation whose loss was not finite, of all attempts."""
        return self.path / "bad_steps.jsonl"

    def append_bad_rows(self, record: Mapping[str, Any]) -> None:
        attempts = self.attempts()
        number = int(attempts[-1].stem) if attempts else 0
        confined.append(self.bad_rows, to_json({"attempt": number, **record}) + "\n", within=self.path)

    def write_result(self, status: Status, step: int, metrics: Mapping[str, Any], *, reason: str | None = None) -> None:
        self.result.write(status, step, metrics, reason=reason)

    def read_result(self) -> dict[str, Any] | None:
        return self.result.read()

    def final_metric(self, name: str) -> float | None:
        """Return the last evaluation's value of a metric, for a sweeper; None if there is none."""
        value = (self.read_result() or {"metrics": {}})["metrics"].get(name)
        return float(value) if isinstance(value, float) or type(value) is int else None

    def is_finished(self) -> bool:
        result = self.read_result()
        return result is not None and result.get("status") == "finished"

    def _names(self) -> list[str]:
        return os.listdir(self.path) if self.path.is_dir() else []


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def nearest_existing(path: Path) -> Path:
    """Return the path itself, or the nearest parent that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def is_run(path: Path) -> bool:
    """Return whether a run was started here. Not by config.yaml alone: other directories may have one of their own."""
    return (path / "config.yaml").is_file() and (path / "attempts").is_dir()


def job_name(overrides: Sequence[str], shared: Collection[str] = ()) -> str:
    """Name a sweep's job by its overrides, not by its number, which would change with the grid: those that are not `shared` by
    all jobs, in characters that `resume=` takes unquoted, and a hash of every override that makes it another run."""
    relevant = sorted(text.lstrip("+") for text in overrides if text.lstrip("+").partition("=")[0] not in NOT_IN_JOB_NAMES)
    shown = [text for text in relevant if text.partition("=")[0] not in shared]
    slug = re.sub(r"[^\w.-]+", "-", "__".join(shown))[:80].strip("._-")
    return f"{slug or 'job'}-{hashlib.sha256(json.dumps(relevant).encode()).hexdigest()[:8]}"


def _runs_in(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in path.iterdir() if is_run(entry) and not entry.name.startswith("."))


def _why_no_run(path: Path) -> str:
    """Say why a path is not a run, and which run was probably meant."""
    if inside := _runs_in(path):
        return f"it is a sweep or a directory of runs: resume one of them, such as {path / inside[0]}"
    if is_run(path.parent):
        return f"it lies inside a run: {as_argument('resume', path.parent)}"
    why = "it is not a run (no config.yaml)" if path.exists() else "there is no such directory"
    if (path / "config.yaml").is_file() and any((path / name).exists() for name in ("checkpoints", "FINAL", "metrics.jsonl")):
        return (
            "attempts/, the record of its starts, is missing: restore it, since it holds the settings that resumes have changed;"
            f" if there were none, mkdir {path}/attempts"
        )
    siblings = _runs_in(path.parent)
    if near := get_close_matches(path.name, siblings, 1):
        return f"{why}; did you mean {path.parent / near[0]}?"
    return f"{why}; {path.parent} holds {', '.join(siblings[:8])}" if siblings else f"{why}, and {path.parent} holds no runs"
