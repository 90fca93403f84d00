"""The directory of one run: what lies where, and the small files that say how far it is. Only rank 0 writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from halos import confined, seals
from halos.config.schema import Scope, keys_of
from halos.config.values import as_argument
from halos.confined import UnreadableError, write_whole
from halos.errors import UserError
from halos.journal import Journal
from halos.lock import NAME as LOCK
from halos.lock import RunLock
from halos.metrics_file import MetricsFile, to_json
from halos.repository import COMMAND

Status = Literal["finished", "stopped", "failed", "running"]
REPORT = "forward_report.json"  # what a start proved of the forward pass
# what a start may leave that died before config.yaml
LEFTOVERS = {"attempts", "train.log", "metrics.jsonl", "result.json", REPORT, LOCK}
ASIDE = "superseded-"
COMMITS = "checkpoints.jsonl"
NOT_RUN = keys_of(Scope.PLACE, Scope.HOST, Scope.COMMAND)
HIDDEN = (".config.yaml.", ".result.json.", f".{REPORT}.", f".{LOCK}.", ".deleted-", "train.rank")
RESERVE, RESERVED = ".result.json.reserve", 2**14  # room for the last word of a run whose disk others have filled
FULL = (errno.ENOSPC, errno.EDQUOT)


class RunDir:
    """A run's directory. Making the object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "FINAL"

    def log_of(self, rank: int) -> Path:
        """Where a process keeps what it says: train.log is the first one's."""
        return self.path / (f"train.rank{rank}.log" if rank else "train.log")

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> MetricsFile:
        return MetricsFile(self.path / "metrics.jsonl")

    @property
    def commits(self) -> Journal:
        """Each checkpoint that has become durable, on record outside checkpoints/: one that is gone has been there."""
        return Journal(self.path / COMMITS)

    def lock(self) -> RunLock:
        return RunLock(self.path / LOCK)

    # --- begin, or go on

    def refuse_occupied(self, *, overwrite: bool) -> None:
        """Raises UserError where a new run cannot begin here; changes nothing."""
        other = "choose another exp_name"
        if is_run(self.path.parent):
            raise UserError(f"{self.path.parent} is a run already, so nothing else can lie in it: {other}")
        if is_run(self.path) and not self.is_finished():
            raise UserError(
                f"{self.path} holds a run that is not finished: {COMMAND} {as_argument('resume', self.path)} goes on with it;"
                f" to begin anew delete the directory, or {other}"
            )
        if is_run(self.path) and not overwrite:
            raise UserError(f"{self.path} holds a finished run: overwrite=true deletes it, or {other}")
        if is_run(self.path) and Path.cwd().is_relative_to(self.path.resolve()):
            raise UserError(f"overwrite=true would delete {self.path.resolve()}, which you are in: change directory, or {other}")
        if is_run(self.path):
            return
        if (self.path / "multirun.yaml").is_file() or _runs(self.path):
            raise UserError(f"{self.path} holds a sweep, and a single run cannot share its name: {other}")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: {other} or run_dir")
        if foreign := [name for name in sorted(self._names()) if name not in LEFTOVERS and not name.startswith(HIDDEN)]:
            raise UserError(f"{self.path} is not empty and no run ({foreign[0]} lies in it): {other} or run_dir")

    def create(self, *, overwrite: bool) -> None:
        """A directory for a new run, with nothing of an older one in it but a lock. Raises UserError where one cannot be.

        Whatever the moment of a crash, what is left is a finished run or no run, which a new one can replace.
        """
        self.refuse_occupied(overwrite=overwrite)
        doomed = self.path / f".deleted-{os.getpid()}"
        confined.remove(doomed)
        names = [name for name in self._names() if name != LOCK and not name.startswith(f".{LOCK}.")]
        doomed.mkdir(parents=True)
        last = ["config.yaml", "attempts", "result.json"]
        for name in sorted(names, key=lambda name: last.index(name) if name in last else -1):
            (self.path / name).rename(doomed / name)
        confined.remove(doomed)
        (self.path / "attempts").mkdir()

    def abandon(self) -> None:
        """Leave nothing of a start that was refused before its first step, so that the command can be mended and given again."""
        if self.checkpoints.is_dir() or self.final.exists() or any(row["step"] for row in self.read_metrics()):
            return
        begun = is_run(self.path)  # then all that lies here but the lock is of this start: it began in an empty directory
        for name in self._names():
            if name != LOCK and (begun or name in LEFTOVERS or name.startswith(HIDDEN)):
                confined.remove(self.path / name)

    @classmethod
    def at(cls, resume: str) -> Self:
        """The run that `resume=` names, by its directory or by one of its checkpoints (RUN/checkpoints/step-N)."""
        place = Path(resume)
        if place.parent.parent.name == "checkpoints" and place.parent.name.startswith(ASIDE):
            raise UserError(
                f"resume={resume}: this checkpoint was set aside; to go on from it move it back into {place.parent.parent}"
                " and resume from it there by name"
            )
        return cls(place.parent.parent if place.parent.name == "checkpoints" else place)

    def open(self) -> None:
        """Raises UserError where no run was begun here, so that none can be resumed, or where something in it leads out of it."""
        if not is_run(self.path):
            raise UserError(f"resume={self.path}: {_no_run(self.path)}")
        confined.inspect(self.path)
        for place in (self.checkpoints, self.final):
            if place.exists() and not place.is_dir():
                raise UserError(f"{place} is a file where a directory belongs: move it away")

    def asked_checkpoint(self, resume: str | None) -> Path | None:
        """The checkpoint that `resume=` names, or None where it leaves the choice to us."""
        if resume is None or Path(resume).parent.name != "checkpoints":
            return None
        asked = self.checkpoints / Path(resume).name
        if asked not in self.saves().values():
            names = [path.name for path in self.saves().values()]
            raise UserError(f"resume={resume}: there is no such checkpoint; there are {', '.join(names) or 'none'}")
        return asked

    def saves(self) -> dict[int, Path]:
        """Checkpoints by step, oldest first, whole or not."""
        there = self.checkpoints.glob("step-*")
        found = [path for path in there if path.name[5:].isdecimal() and len(path.name) < 20 and path.is_dir()]
        return {step_of(path): path for path in sorted(found, key=step_of)}

    # --- what it holds

    def write_config(self, text: str) -> None:
        """config.yaml, once."""
        assert not self.config.exists(), "a run's configuration is written once"
        write_whole(self.config, text)

    def read_config(self) -> str:
        """The text of config.yaml. Raises UserError where it is none."""
        return confined.read_text(self.config, within=self.path, most=confined.SETTINGS)

    def attempts(self) -> list[Path]:
        """Their records, oldest first."""
        found = [path for path in (self.path / "attempts").glob("*.yaml") if path.stem.isdecimal() and len(path.stem) < 10]
        return sorted(found, key=lambda path: int(path.stem))

    def next_attempt(self) -> int:
        return 1 + int(self.attempts()[-1].stem) if self.attempts() else 0

    def start_attempt(self, record: Mapping[str, Any]) -> int:
        """attempts/NNN.yaml: what was typed, which versions, why it went on where it did. Gives back NNN."""
        number = self.next_attempt()
        (self.path / "attempts").mkdir(parents=True, exist_ok=True)
        before = [*self.read_attempts().values()][-1:]
        text = seals.attempt(record, config=self.read_config(), before=before[0] if before else None)
        write_whole(self.path / "attempts" / f"{number:03d}.yaml", text, within=self.path)
        return number

    def read_attempts(self) -> dict[str, str]:
        """The text of each record by its name, oldest first."""
        return {path.name: confined.read_text(path, within=self.path, most=confined.SETTINGS) for path in self.attempts()}

    def set_aside(self, step: int, *, final: bool) -> tuple[Path, list[str]]:
        """Moves checkpoints after `step`, and with `final` FINAL, into checkpoints/superseded-NNN/; NNN is the coming attempt.

        Their lines of metrics.jsonl are copied there. The newest goes first, so that a crash in between leaves a run that
        lacks its newest checkpoints, and no gap. Gives back the place and what was moved.
        """
        place = self.checkpoints / f"{ASIDE}{self.next_attempt():03d}"
        later = [path for number, path in reversed(self.saves().items()) if number > step]
        moved = [*later, *([self.final] if final and self.final.exists() else [])]
        if moved:
            if place.exists() and not place.is_dir():
                confined.remove(place)  # of that name is only what we set aside
            place.mkdir(parents=True, exist_ok=True)
            rows = [row for row in self.read_metrics() if row["step"] > step]
            write_whole(place / "metrics.jsonl", "".join(to_json(row) + "\n" for row in rows), within=self.path)
        for path in moved:
            path.rename(place / path.name)
        return place, [path.name for path in moved]

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; it has a `step`."""
        self.metrics.append(row)

    @property
    def bad_rows(self) -> Path:
        """The rows of every step that was skipped and of every evaluation whose loss was not finite, of all attempts."""
        return self.path / "bad_steps.jsonl"

    def append_bad_rows(self, record: Mapping[str, Any]) -> None:
        attempts = self.attempts()
        number = int(attempts[-1].stem) if attempts else 0
        confined.append(self.bad_rows, to_json({"attempt": number, **record}) + "\n", within=self.path)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows that can be read."""
        return self.metrics.read()

    def go_on_from(self, step: int) -> int:
        """Drop what was logged after the step that the run goes on from. How many lines of its metrics were damaged."""
        return self.metrics.keep_until(step)

    def write_result(self, status: Status, step: int, metrics: Mapping[str, Any], *, reason: str | None = None) -> None:
        """result.json, because a launcher turns every exit status but 0 into 1."""
        why = {"reason": reason} if reason else {}
        known = to_json({"status": status, "step": step, "metrics": metrics, **why})
        text = f'{known[:-1]}, "seal": "{seals.digest(known)}"}}\n'
        result, reserve = self.path / "result.json", self.path / RESERVE
        if status == "running":  # on a disk that others fill there is still room for what comes of it
            write_whole(reserve, " " * RESERVED, within=self.path)
        try:
            write_whole(result, text, within=self.path)
        except OSError as error:
            if error.errno not in FULL or not confined.fill(reserve, text):
                raise
            os.replace(reserve, result)
        if status != "running":
            confined.remove(reserve)

    def read_result(self) -> dict[str, Any] | None:
        """None where there is none that can be read."""
        try:
            result = confined.load_object(self.path / "result.json", within=self.path)
        except UnreadableError:
            return None
        if sealed_result(self.path / "result.json") is False:
            return None
        result.pop("seal", None)
        kinds = {"status": str, "step": int, "metrics": dict}
        return result if all(type(result.get(name)) is kind for name, kind in kinds.items()) else None

    def final_value(self, metric: str) -> float | None:
        """A metric's last held-out value, for a sweeper; None where the run has none."""
        value = (self.read_result() or {"metrics": {}})["metrics"].get(metric)
        return float(value) if isinstance(value, float) or type(value) is int else None

    def is_finished(self) -> bool:
        result = self.read_result()
        return result is not None and result.get("status") == "finished"

    def _names(self) -> list[str]:
        return os.listdir(self.path) if self.path.is_dir() else []


def sealed_result(path: Path) -> bool | None:
    """Whether result.json is what was written; None for one that is older than its seal."""
    try:
        result = confined.load_object(path)
    except UnreadableError:
        return False
    seal = result.pop("seal", None)
    return None if seal is None else seals.digest(to_json(result)) == seal


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def existing(path: Path) -> Path:
    """The path itself, or the nearest directory above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def is_run(path: Path) -> bool:
    """Whether a run was begun here: other directories may well have a config.yaml of their own."""
    return (path / "config.yaml").is_file() and (path / "attempts").is_dir()


def job_name(overrides: Sequence[str], shared: Collection[str] = ()) -> str:
    """A sweep's job by what was typed for it: its place in the grid would move when the grid changes.

    A few words for people, of keys that are not `shared` by all jobs and in letters that `resume=` takes unquoted; and a hash
    of everything that makes it another run.
    """
    told = sorted(text.lstrip("+") for text in overrides if text.lstrip("+").partition("=")[0] not in NOT_RUN)
    words = [text for text in told if text.partition("=")[0] not in shared]
    slug = re.sub(r"[^\w.-]+", "-", "__".join(words))[:80].strip("._-")
    return f"{slug or 'job'}-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]}"


def _runs(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in path.iterdir() if is_run(entry) and not entry.name.startswith("."))


def _no_run(place: Path) -> str:
    """Why a path is no run, and which one was probably meant."""
    if inside := _runs(place):
        return f"it is a sweep or a directory of runs: resume one of them, such as {place / inside[0]}"
    if is_run(place.parent):
        return f"it lies inside a run: {as_argument('resume', place.parent)}"
    what = "it is no run (no config.yaml)" if place.exists() else "there is no such directory"
    if (place / "config.yaml").is_file() and any((place / name).exists() for name in ("checkpoints", "FINAL", "metrics.jsonl")):
        return (
            "attempts/, the record of its starts, is missing from it: bring it back, since settings that a resume changed stand"
            f" there; where none were changed, mkdir {place}/attempts"
        )
    siblings = _runs(place.parent)
    if near := get_close_matches(place.name, siblings, 1):
        return f"{what}; did you mean {place.parent / near[0]}?"
    return f"{what}; {place.parent} holds {', '.join(siblings[:8])}" if siblings else f"{what}, and {place.parent} holds no runs"
