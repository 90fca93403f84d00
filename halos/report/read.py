"""Read saved runs from their config.yaml, metrics.jsonl and result.json."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halos import confined
from halos.config.resume_policy import apply_changes
from halos.config.run_config import changed_keys
from halos.errors import UserError
from halos.rundir import RunDir, is_run

Rows = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One run as recorded in its files. `label` is a short name, unique within a report; `loss` see `loss_of`."""

    path: Path
    label: str
    loss: str
    config: Mapping[str, Any]
    status: str
    step: int
    train: Rows
    evals: Rows

    @property
    def is_online_run(self) -> bool:
        """Whether its steps are online rounds."""
        return _is_online_run(self.config)

    @property
    def seconds(self) -> float:
        """Seconds spent in steps and evaluations, or in rounds; each row holds the time since the previous one."""
        rows = (*self.train, *self.evals)
        if self.is_online_run:
            return float(sum(value for row in rows for name, value in row.items() if name.startswith("seconds/")))
        return sum(row.get("seconds") or 0.0 for row in rows)

    def node(self, name: str) -> Mapping[str, Any]:
        part = self.config.get(name)
        return part if isinstance(part, Mapping) else {}


def _continued(run: RunDir, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with what its resumes have changed. A key that has another name since stays as the run began, and so does
    what a damaged record says, which `halos.checkpoint verify` names."""
    with suppress(UserError):
        for record in run.read_attempts().values():
            for key, values in changed_keys(record).items():
                with suppress(KeyError, TypeError, ValueError):
                    apply_changes(config, {key: values})
    return config


def _is_online_run(config: Mapping[str, Any]) -> bool:
    online = config.get("online")
    return isinstance(online, Mapping) and bool(online) and online.get("steps") is None


def loss_of(config: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """Return the loss that a run was started with: the choice of config/loss, since choices share functions (dapo and gspo are
    grpo's), `online` before the loss inside of online training, and `humanline` before one whose log-ratios are clamped.
    `overrides` are those of its first attempt, by which older runs are named. Where neither tells, as for a `_target_` of the
    user's, it is the function's: halos.losses.dpo.dpo -> dpo."""
    online, loss, bounds = (
        node if isinstance(node := config.get(name), Mapping) else {} for name in ("online", "loss", "humanline")
    )
    target = str(loss.get("_target_", "?"))
    function = target.rpartition(".")[0].rpartition(".")[2] or "?"
    words = [*overrides, *(online.get("overrides") or [])]
    if _is_online_run(config):
        name = online.get("loss")
    elif "loss_choice" in config:
        name = config["loss_choice"] or function
    elif any(word.lstrip("+").startswith("loss._target_=") for word in words):
        name = function
    else:
        chosen = [word.removeprefix("loss=") for word in overrides if word.startswith("loss=")]
        name = online.get("loss") or (chosen[-1] if chosen else function)
    is_clamped = bounds.get("low") is not None or bounds.get("high") is not None
    return f"{'humanline ' if is_clamped else ''}{'online ' if online else ''}{name}"


def first_overrides(path: Path) -> list[str]:
    """Return the overrides of a run's first attempt; none where the report has no readable record of it."""
    first = path / "attempts" / "000.yaml"
    try:
        record = confined.parse_yaml(confined.read_text(first, within=path, most=confined.SETTINGS), str(first))
    except UserError:
        return []
    overrides = record.get("overrides") if isinstance(record, Mapping) else []
    return [str(each) for each in overrides] if isinstance(overrides, list) else []


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of one metric, from the rows that have it; null, written where it is not finite, is nan."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    values = [value if isinstance(value, (int, float)) else float("nan") for _, value in pairs]
    return np.array([step for step, _ in pairs], dtype=float), np.array(values, dtype=float)


def read_runs(paths: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """Return the runs at and below `paths`, and messages on those skipped. Raises UserError where there is nothing to report."""
    runs, skipped = [], []
    for root in dict.fromkeys(paths):
        below = runs_below(root)
        for path in below:
            if problem := _nothing_logged(path):
                if below == [root]:
                    raise UserError(problem)
                skipped.append(problem)
            elif path.resolve() not in [other.resolve() for other in runs]:
                runs.append(path)
    if not runs:
        raise UserError("nothing to report:\n" + "\n".join(f"  {problem}" for problem in skipped))
    skipped += [f"{count} damaged lines of {path / 'metrics.jsonl'}" for path in runs if (count := _damaged(path))]
    return [_read(path, label) for path, label in zip(runs, _labels(runs), strict=True)], skipped


def _damaged(path: Path) -> int:
    return len(RunDir(path).metrics.damaged())


def runs_below(path: Path) -> list[Path]:
    """Return `path` itself where it is a run, else every run below it. Raises UserError where there is none."""
    if _looks_like_run(path):
        return [path]
    below = []
    for folder, names, _ in os.walk(path):
        names[:] = sorted(name for name in names if not name.startswith("."))
        runs = [name for name in names if _looks_like_run(Path(folder, name))]
        below += [Path(folder, name) for name in runs]
        names[:] = [name for name in names if name not in runs]
    if not below and not path.exists():
        raise UserError(f"{path}: there is no such directory")
    if not below:
        raise UserError(f"{path} is neither a run nor a directory of runs: it has no config.yaml with a metrics.jsonl next to it")
    return sorted(below, key=_natural)


def _natural(path: Path) -> list[tuple[float, str]]:
    """Return a sort key that orders numbers in names by value: optim.lr=1e-5 before optim.lr=1e-4."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", str(path))
    return [(float(part), "") if i % 2 else (-1.0, part) for i, part in enumerate(parts)]


def _looks_like_run(path: Path) -> bool:
    """Return whether a directory is a run, also where only its small files were copied here."""
    return is_run(path) or ((path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file())


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
    config = _continued(run, deepcopy(dict(config)))
    rows = run.read_metrics()
    result = run.read_result()
    if result is None and (path / "result.json").exists():
        raise UserError(f"{path / 'result.json'} cannot be read")
    train = tuple(row for row in rows if row.get("split") == "train")
    evals = tuple(row for row in rows if row.get("split") == "eval")
    if not train and not evals:
        more = f": it cannot be read, {count} lines are damaged" if (count := _damaged(path)) else ""
        raise UserError(f"{path / 'metrics.jsonl'} has no row with split train or eval{more}")
    last = max(row["step"] for row in (*train, *evals))
    status = result["status"] if result else "unknown (no result.json)"
    return Record(
        path, label, loss_of(config, first_overrides(path)), config, status, result["step"] if result else last, train, evals
    )


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the shortest unique names of the runs; jobs of a sweep lose the hash after their overrides."""

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
