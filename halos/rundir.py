"""The directory of one run: what lies where, and the small files that say how far it is. Only rank 0 writes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from halos.errors import UserError
from halos.lock import NAME as LOCK
from halos.lock import RunLock

Status = Literal["finished", "stopped", "failed", "running"]
LEFTOVERS = {"attempts", "train.log", "metrics.jsonl", "result.json", LOCK}  # what a start may leave that died before config.yaml
ASIDE = "superseded-"
PLACE = ("exp_name", "output_root", "run_dir", "cache_dir", "resume", "resume_changes", "overwrite", "dry_run")  # not what is run
HIDDEN = (".config.yaml.", f".{LOCK}.", ".deleted-", "train.rank")


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
                f"{self.path} holds a run that is not finished: python train.py resume={self.path} goes on with it;"
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
        shutil.rmtree(doomed, ignore_errors=True)
        names = [name for name in self._names() if name != LOCK and not name.startswith(f".{LOCK}.")]
        doomed.mkdir(parents=True)
        last = ["config.yaml", "attempts", "result.json"]
        for name in sorted(names, key=lambda name: last.index(name) if name in last else -1):
            (self.path / name).rename(doomed / name)
        shutil.rmtree(doomed)
        (self.path / "attempts").mkdir()

    def abandon(self) -> None:
        """Leave nothing of a start that was refused before its first step, so that the command can be mended and given again."""
        if self.checkpoints.is_dir() or self.final.exists() or any(row["step"] for row in self.read_metrics()):
            return
        logs = [path.name for path in self.path.glob("train.*log")]
        for name in ("attempts", "config.yaml", "metrics.jsonl", "result.json", *logs):
            entry = self.path / name
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)

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
        """Raises UserError where no run was begun here, so that none can be resumed."""
        if not is_run(self.path):
            raise UserError(f"resume={self.path}: {_no_run(self.path)}")

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
        found = [path for path in self.checkpoints.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()]
        return {step_of(path): path for path in sorted(found, key=step_of)}

    # --- what it holds

    def write_config(self, text: str) -> None:
        """config.yaml, once."""
        assert not self.config.exists(), "a run's configuration is written once"
        write_whole(self.config, text)

    def read_config(self) -> str:
        """The text of config.yaml. Raises UserError where it is none."""
        try:
            return self.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.config} cannot be read: {error}") from error

    def attempts(self) -> list[Path]:
        """Their records, oldest first."""
        found = [path for path in (self.path / "attempts").glob("*.yaml") if path.stem.isdecimal()]
        return sorted(found, key=lambda path: int(path.stem))

    def next_attempt(self) -> int:
        return 1 + int(self.attempts()[-1].stem) if self.attempts() else 0

    def start_attempt(self, record: Mapping[str, Any]) -> int:
        """attempts/NNN.yaml: what was typed, which versions, why it went on where it did. Gives back NNN."""
        number = self.next_attempt()
        (self.path / "attempts").mkdir(parents=True, exist_ok=True)
        write_whole(
            self.path / "attempts" / f"{number:03d}.yaml", yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True)
        )
        return number

    def set_aside(self, step: int, *, final: bool) -> tuple[Path, list[str]]:
        """Moves checkpoints after `step`, and with `final` FINAL, into checkpoints/superseded-NNN/; NNN is the coming attempt.

        Their lines of metrics.jsonl are copied there. The newest goes first, so that a crash in between leaves a run that
        lacks its newest checkpoints, and no gap. Gives back the place and what was moved.
        """
        place = self.checkpoints / f"{ASIDE}{self.next_attempt():03d}"
        later = [path for number, path in reversed(self.saves().items()) if number > step]
        moved = [*later, *([self.final] if final and self.final.exists() else [])]
        if moved:
            place.mkdir(parents=True, exist_ok=True)
            rows = [row for row in self.read_metrics() if row["step"] > step]
            write_whole(place / "metrics.jsonl", "".join(_json(row) + "\n" for row in rows))
        for path in moved:
            path.rename(place / path.name)
        return place, [path.name for path in moved]

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; it has a `step`."""
        assert "step" in row
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_json(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows; a last line that was cut off by a crash is passed over."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        *whole, _torn = path.read_text(encoding="utf-8").split("\n")  # what follows the last line's end is no line
        return [json.loads(line) for line in whole]

    def truncate_metrics(self, after_step: int) -> None:
        """Drops what was logged after the step that the run goes on from, so that no step appears twice."""
        kept = [row for row in self.read_metrics() if row["step"] <= after_step]
        write_whole(self.path / "metrics.jsonl", "".join(_json(row) + "\n" for row in kept))

    def write_result(self, status: Status, step: int, metrics: Mapping[str, Any], *, reason: str | None = None) -> None:
        """result.json, because a launcher turns every exit status but 0 into 1."""
        why = {"reason": reason} if reason else {}
        write_whole(self.path / "result.json", _json({"status": status, "step": step, "metrics": metrics, **why}) + "\n")

    def read_result(self) -> dict[str, Any] | None:
        """None where there is none that can be read."""
        try:
            result = json.loads((self.path / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return result if isinstance(result, dict) and result.keys() >= {"status", "step", "metrics"} else None

    def final_value(self, metric: str) -> float | None:
        """A metric's last held-out value, for a sweeper; None where the run has none."""
        value = (self.read_result() or {"metrics": {}})["metrics"].get(metric)
        return float(value) if isinstance(value, (int, float)) else None

    def is_finished(self) -> bool:
        result = self.read_result()
        return result is not None and result.get("status") == "finished"

    def _names(self) -> list[str]:
        return os.listdir(self.path) if self.path.is_dir() else []


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def is_run(path: Path) -> bool:
    """Whether a run was begun here: other directories may well have a config.yaml of their own."""
    return (path / "config.yaml").is_file() and (path / "attempts").is_dir()


def job_name(overrides: Sequence[str], shared: Collection[str] = ()) -> str:
    """A sweep's job by what was typed for it: its place in the grid would move when the grid changes.

    A few words for people, of keys that are not `shared` by all jobs and in letters that `resume=` takes unquoted; and a hash
    of everything that makes it another run.
    """
    told = sorted(text.lstrip("+") for text in overrides if text.lstrip("+").partition("=")[0] not in PLACE)
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
        return f"it lies inside a run: resume={place.parent}"
    what = "it is no run (no config.yaml)" if place.exists() else "there is no such directory"
    siblings = _runs(place.parent)
    if near := get_close_matches(place.name, siblings, 1):
        return f"{what}; did you mean {place.parent / near[0]}?"
    return f"{what}; {place.parent} holds {', '.join(siblings[:8])}" if siblings else f"{what}, and {place.parent} holds no runs"


def _json(value: Any) -> str:
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def write_whole(path: Path, text: str) -> None:
    """The whole file or nothing, also after a power cut."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    with hidden.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(hidden, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
