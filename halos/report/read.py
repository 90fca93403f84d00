"""Saved runs, read back from config.yaml, metrics.jsonl and result.json."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halos import confined
from halos.errors import UserError
from halos.rundir import RunDir, is_run

Rows = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One run as its files tell it. `label` is short, and no other run of the same report has it."""

    path: Path
    label: str
    config: Mapping[str, Any]
    status: str
    step: int
    train: Rows
    held_out: Rows

    @property
    def loss(self) -> str:
        """halos.losses.dpo.dpo -> dpo; of online rounds what each trains with."""
        if self.is_walk:
            return f"online {self.node('online').get('loss')}"
        return str(self.node("loss").get("_target_", "?")).rpartition(".")[0].rpartition(".")[2] or "?"

    @property
    def is_walk(self) -> bool:
        """Whether its steps are online rounds."""
        online = self.node("online")
        return bool(online) and online.get("steps") is None

    @property
    def seconds(self) -> float:
        """Spent in steps and evaluations, or in the stages of rounds; every row has the time since the one before it."""
        stages = [value for row in self.train for name, value in row.items() if name.startswith("seconds/")]
        if stages:
            return float(sum(stages))
        return sum(row.get("seconds") or 0.0 for row in (*self.train, *self.held_out))

    def node(self, name: str) -> Mapping[str, Any]:
        part = self.config.get(name)
        return part if isinstance(part, Mapping) else {}


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, from the rows that have it; null (which stood for no finite number) is nan."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    values = [value if isinstance(value, (int, float)) else float("nan") for _, value in found]
    return np.array([step for step, _ in found], dtype=float), np.array(values, dtype=float)


def read_runs(places: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """The runs at and below `places`, and what was passed over below them. Raises UserError where there is nothing to report."""
    found, passed = [], []
    for place in dict.fromkeys(places):
        inside = runs_below(place)
        for path in inside:
            if problem := _nothing_logged(path):
                if inside == [place]:
                    raise UserError(problem)
                passed.append(problem)
            elif path.resolve() not in [other.resolve() for other in found]:
                found.append(path)
    if not found:
        raise UserError("nothing to report:\n" + "\n".join(f"  {problem}" for problem in passed))
    passed += [f"{count} damaged lines of {path / 'metrics.jsonl'}" for path in found if (count := _damaged(path))]
    return [_read(path, label) for path, label in zip(found, _labels(found), strict=True)], passed


def _damaged(path: Path) -> int:
    return len(RunDir(path).metrics.damaged())


def runs_below(place: Path) -> list[Path]:
    """`place` itself where it is a run, else every run below it. Raises UserError where there is none."""
    if _looks_like_run(place):
        return [place]
    found = []
    for folder, names, _ in os.walk(place):
        names[:] = sorted(name for name in names if not name.startswith("."))
        runs = [name for name in names if _looks_like_run(Path(folder, name))]
        found += [Path(folder, name) for name in runs]
        names[:] = [name for name in names if name not in runs]
    if not found and not place.exists():
        raise UserError(f"{place}: there is no such directory")
    if not found:
        raise UserError(f"{place} is neither a run nor a directory of runs: no config.yaml with a metrics.jsonl beside it")
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[float, str]]:
    """Numbers in names by their size: optim.lr=1e-5 before optim.lr=1e-4."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", str(path))
    return [(float(part), "") if i % 2 else (-1.0, part) for i, part in enumerate(parts)]


def _looks_like_run(place: Path) -> bool:
    """Also where only the small files were copied here."""
    return is_run(place) or ((place / "config.yaml").is_file() and (place / "metrics.jsonl").is_file())


def _nothing_logged(path: Path) -> str | None:
    if RunDir(path).read_metrics():
        return None
    result = RunDir(path).read_result() or {}
    status = result.get("status")
    return f"{path} has logged nothing yet (metrics.jsonl is empty{f', status {status}' if status else ''}): try again later"


def _read(path: Path, label: str) -> Record:
    run = RunDir(path)
    config = confined.parse_yaml(run.read_config(), str(run.config))
    if not isinstance(config, Mapping):
        raise UserError(f"{run.config} holds no configuration")
    rows = run.read_metrics()
    result = run.read_result()
    if result is None and (path / "result.json").exists():
        raise UserError(f"{path / 'result.json'} cannot be read")
    train = tuple(row for row in rows if row.get("split") == "train")
    held_out = tuple(row for row in rows if row.get("split") == "eval")
    if not train and not held_out:
        more = f": it cannot be read, {count} lines are damaged" if (count := _damaged(path)) else ""
        raise UserError(f"{path / 'metrics.jsonl'} has no row with split train or eval{more}")
    last = max(row["step"] for row in (*train, *held_out))
    status = result["status"] if result else "unknown (no result.json)"
    return Record(path, label, config, status, result["step"] if result else last, train, held_out)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest names that tell the runs apart; a sweep's jobs lose the hash behind what was typed for them."""

    def tail(parts: int) -> Callable[[Path], str]:
        return lambda path: "/".join(path.resolve().parts[-parts:])

    forms: Iterable[Callable[[Path], str]] = [
        lambda path: re.sub(r"-[0-9a-f]{8}$", "", path.resolve().name),
        lambda path: re.sub(r"-[0-9a-f]{8}$", "", "/".join(path.resolve().parts[-2:])),
        *[tail(parts) for parts in range(1, 5)],
    ]
    for form in forms:
        if len(set(names := [form(path) for path in paths])) == len(paths):
            return names
    return [str(path) for path in paths]
