"""A sweep's runs against what was swept: a table sorted by the objective, as csv and Markdown, and pictures."""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from halos import confined
from halos.config.schema import Scope, keys_of
from halos.errors import UserError
from halos.report.plots import palette, plot, save
from halos.report.read import Record, read_runs
from halos.report.table import table

NOT_SWEPT = keys_of(Scope.PLACE, Scope.HOST, Scope.COMMAND, Scope.CODE)
# measures on one scale whatever the loss, of which more is better
COMPARABLE = ("rewards/accuracies", "logps/accuracies", "accuracy", "win_rate", "reward")
MAX_TICKS = 7  # values of a key that each get a tick
MAX_NAMES = 12  # values of a key that is no number, beyond which it gets no picture


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep: what was typed for it, and where its objective has come to."""

    record: Record
    typed: Mapping[str, str]
    objective: float  # the last held-out value; nan where there is none, and of a run that failed


def is_sweep(place: Path) -> bool:
    """Whether jobs of one command lie here: the basic sweeper leaves multirun.yaml, every sweep that came to an end its table."""
    return (place / "multirun.yaml").is_file() or (place / "sweep.csv").is_file()


def compare(place: Path, output: Path | None = None) -> tuple[str, list[Path]]:
    """The table of the sweep at `place`, and the files that were written: sweep.csv, sweep.md, and pictures in report/.

    Raises UserError where no run of it has logged anything.
    """
    records, _ = read_runs([place])
    typed = [_overrides(record.path) for record in records]
    keys = swept(typed)
    metric, mode, note = _ranking(records, keys)
    trials = [Trial(record, words, _last(record, metric)) for record, words in zip(records, typed, strict=True)]
    if mode is not None:
        trials.sort(key=lambda trial: _rank(trial.objective, mode))
    trials = _with_labels(trials, keys)
    text = markdown(trials, keys, metric, mode) + (f"\n{note}\n" if note else "")
    written = [place / "sweep.csv", place / "sweep.md"]
    _write_csv(written[0], trials, keys)
    _write(written[1], f"# {place.name}\n\n{text}\n{table([trial.record for trial in trials])}")
    output = output or place / "report"
    written += plot([trial.record for trial in trials], output)
    if figure := draw(trials, keys, metric):
        written.append(save(figure, output / "objective.png"))
    return text, written


def swept(typed: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys that have not the same value in all runs, in the order in which they were typed."""
    keys = dict.fromkeys(key for words in typed for key in words if key not in NOT_SWEPT)
    return [key for key in keys if len({words.get(key) for words in typed}) > 1]


def markdown(trials: Sequence[Trial], keys: Sequence[str], metric: str, mode: str | None) -> str:
    """The best first, where there is a `mode`."""
    header = [*keys, f"{metric} ({mode or 'not ranked'})", "status", "step"]
    lines = [header, ["---"] * len(header)]
    for trial in trials:
        value = f"{trial.objective:.4g}" if math.isfinite(trial.objective) else ""
        lines.append([*(trial.typed.get(key, "") for key in keys), value, trial.record.status, str(trial.record.step)])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def draw(trials: Sequence[Trial], keys: Sequence[str], metric: str) -> Figure | None:
    """The objective against each swept key; runs that share every other value are joined by a line."""
    known = [trial for trial in trials if math.isfinite(trial.objective)]
    shown = [key for key in keys if _can_show([trial.typed.get(key, "") for trial in known])]
    if not shown or len(known) < 2:
        return None
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(max(6.0, 5.0 * columns), 3.9 * lines + 0.4), dpi=150, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for key, ax in zip(shown, axes, strict=False):
        _fill(ax, known, key, [other for other in keys if other != key], metric)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    return figure


def _fill(ax: Axes, trials: Sequence[Trial], key: str, others: Sequence[str], metric: str) -> None:
    places, names = _positions([trial.typed.get(key, "") for trial in trials])
    groups = [", ".join(f"{other}={trial.typed.get(other, '')}" for other in others) for trial in trials]
    colors = dict(zip(dict.fromkeys(groups), palette(len(set(groups))), strict=True))
    for group, color in colors.items():
        mine = sorted((places[n], trials[n].objective) for n, name in enumerate(groups) if name == group)
        x, y = zip(*mine, strict=True)
        joined = len(set(x)) == len(x) > 1
        ax.plot(x, y, color=color, linewidth=1.4 if joined else 0, marker="o", markersize=6, label=group or None)
    numbers = np.array(places)
    if names is None and numbers.min() > 0 and numbers.max() >= 10 * numbers.min():
        ax.set_xscale("log")
    if names is None and len(set(places)) <= MAX_TICKS:
        ax.set_xticks(sorted(set(places)), [f"{place:g}" for place in sorted(set(places))])
        ax.minorticks_off()
    if names is not None:
        ax.set_xticks(range(len(names)), names, rotation=20 if max(map(len, names)) > 10 else 0)
        ax.margins(x=0.15)
    ax.set_xlabel(key)
    ax.set_title(metric, fontsize=11, loc="left")
    ax.grid(alpha=0.25, linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    if others and len(colors) <= 8:
        ax.legend(frameon=False, fontsize=8)


def _positions(values: Sequence[str]) -> tuple[list[float], list[str] | None]:
    """Where each value stands on an axis, and the names of the ticks where they are no numbers."""
    try:
        return [float(value) for value in values], None
    except ValueError:
        names = list(dict.fromkeys(sorted(values)))
        return [float(names.index(value)) for value in values], [name or "(default)" for name in names]


def _can_show(values: Sequence[str]) -> bool:
    return len(set(values)) > 1 and (_positions(values)[1] is None or len(set(values)) <= MAX_NAMES)


def _with_labels(trials: Sequence[Trial], keys: Sequence[str]) -> list[Trial]:
    """The runs under what was swept, where that tells them apart."""
    names = [", ".join(f"{key}={trial.typed.get(key, '')}" for key in keys) for trial in trials]
    if len(set(names)) < len(names):
        return list(trials)
    return [replace(trial, record=replace(trial.record, label=name)) for trial, name in zip(trials, names, strict=True)]


def _ranking(records: Sequence[Record], keys: Sequence[str]) -> tuple[str, str | None, str]:
    """What runs are compared by, which way is better (None: they cannot be ranked), and what there is to say of it.

    Losses, and the rewards and margins that they imply, are on a scale of each loss's own, which its knobs stretch too.
    """
    metric, mode = _objective(records)
    unlike = len({record.loss for record in records}) > 1 or not {"loss", "online.loss"}.isdisjoint(keys)
    moved = next((key for key in keys if key.startswith("loss.")), None)
    if metric in COMPARABLE or (not unlike and moved is None):
        return metric, mode, ""
    why = f"{metric} is on a scale of each loss's own" if unlike else f"{metric} is on a scale that {moved} moves"
    shared = next((name for name in COMPARABLE if all(math.isfinite(_last(record, name)) for record in records)), None)
    if shared is None:
        return metric, None, f"Not ranked: {why}, and the runs have no other measure in common."
    return shared, "max", f"Ranked by {shared}: {why}."


def _objective(records: Sequence[Record]) -> tuple[str, str]:
    """Of those that runs are judged by (a sweep over losses may have several) the one that most of them measure."""
    named = [(str(node.get("metric")), str(node.get("mode"))) for node in (record.node("objective") for record in records)]
    measured = {pair: sum(math.isfinite(_last(record, pair[0])) for record in records) for pair in named}
    return max(measured, key=lambda pair: (measured[pair], named.count(pair)))


def _last(record: Record, metric: str) -> float:
    values = [row[metric] for row in record.held_out if isinstance(row.get(metric), (int, float))]
    return float(values[-1]) if values and record.status != "failed" else math.nan


def _rank(value: float, mode: str) -> float:
    if not math.isfinite(value):
        return math.inf
    return -value if mode == "max" else value


def _overrides(run: Path) -> dict[str, str]:
    """Overrides of a run's first start, key -> value."""
    first = run / "attempts" / "000.yaml"
    try:
        record = confined.parse_yaml(confined.read_text(first, within=run, most=confined.SETTINGS), str(first))
    except UserError:
        return {}
    words = record.get("overrides") if isinstance(record, dict) else []
    words = words if isinstance(words, list) else []
    pairs = [str(word).lstrip("+~").partition("=") for word in words]
    return {key: value for key, _, value in pairs}


def _write_csv(path: Path, trials: Sequence[Trial], keys: Sequence[str]) -> None:
    metrics = list(dict.fromkeys(name for trial in trials for row in trial.record.held_out[-1:] for name in row))
    metrics = [name for name in metrics if name not in ("step", "split", "seconds", "examples")]
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    with hidden.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "status", "step", *keys, *(f"eval/{name}" for name in metrics), "seconds"])
        for trial in trials:
            record = trial.record
            last = record.held_out[-1] if record.held_out else {}
            values = [last.get(name, "") for name in metrics]
            own = [trial.typed.get(key, "") for key in keys]
            writer.writerow([record.path.name, record.status, record.step, *own, *values, round(record.seconds, 1)])
    os.replace(hidden, path)


def _write(path: Path, text: str) -> None:
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    hidden.write_text(text, encoding="utf-8")
    os.replace(hidden, path)
