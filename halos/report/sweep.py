"""Report on a sweep: a table of the swept keys sorted by the objective, as csv and Markdown, and figures."""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from halos.config.schema import Scope, keys_of
from halos.report.plots import palette, plot, save
from halos.report.read import Record, first_overrides, read_runs
from halos.report.table import table

NOT_SWEPT = keys_of(Scope.PLACE, Scope.HOST, Scope.COMMAND, Scope.CODE)
# metrics with the same scale for every loss, of which more is better
COMPARABLE = ("rewards/accuracies", "logps/accuracies", "accuracy", "win_rate", "reward")
OF_REWARDS = ("reward", "win_rate")  # which a scorer gives: another one has other scales
SCALES = {f"online.scorer.{name}" for name in ("name", "functions", "aggregation", "model", "label", "pairwise", "rubric")}
MAX_TICKS = 7  # numeric values of a key; more have automatic ticks
MAX_NAMES = 12  # non-numeric values of a key; a key with more has no figure


@dataclass(frozen=True, slots=True)
class SweptRun:
    """One run of a sweep: its overrides, and the value of its objective."""

    record: Record
    overrides: Mapping[str, str]
    objective: float  # the last evaluation's value; nan where there is none, and for a failed run


def is_sweep(path: Path) -> bool:
    """Return whether a directory is a sweep's: the basic sweeper writes multirun.yaml, every completed sweep its table."""
    return (path / "multirun.yaml").is_file() or (path / "sweep.csv").is_file()


def compare(path: Path, output: Path | None = None) -> tuple[str, list[Path]]:
    """Write sweep.csv and sweep.md for the sweep at `path`, and figures in `output` (default: report/). Return table and files.

    Raises UserError where none of its runs has logged anything.
    """
    records, _ = read_runs([path])
    overrides = [_overrides(record.path) for record in records]
    keys = swept(overrides)
    metric, mode, note = _ranking(records, keys)
    runs = [SweptRun(record, own, _last(record, metric)) for record, own in zip(records, overrides, strict=True)]
    if mode is not None:
        runs.sort(key=lambda run: _rank(run.objective, mode))
    runs = _with_labels(runs, keys)
    text = markdown(runs, keys, metric, mode) + (f"\n{note}\n" if note else "")
    written = [path / "sweep.csv", path / "sweep.md"]
    _write_csv(written[0], runs, keys)
    _write(written[1], f"# {path.name}\n\n{text}\n{table([run.record for run in runs])}")
    output = output or path / "report"
    written += plot([run.record for run in runs], output)
    if mode is not None and (figure := draw(runs, keys, metric)):  # else the objectives have no common axis
        written.append(save(figure, output / "objective.png"))
    return text, written


def swept(overrides: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys whose values differ between runs, in the order of the overrides."""
    keys = dict.fromkeys(key for each in overrides for key in each if key not in NOT_SWEPT)
    return [key for key in keys if len({each.get(key) for each in overrides}) > 1]


def markdown(runs: Sequence[SweptRun], keys: Sequence[str], metric: str, mode: str | None) -> str:
    """Format the runs as a Markdown table, in their order."""
    header = [*keys, f"{metric} ({mode or 'not ranked'})", "status", "step"]
    lines = [header, ["---"] * len(header)]
    for run in runs:
        value = f"{run.objective:.4g}" if math.isfinite(run.objective) else ""
        lines.append([*(run.overrides.get(key, "") for key in keys), value, run.record.status, str(run.record.step)])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def draw(runs: Sequence[SweptRun], keys: Sequence[str], metric: str) -> Figure | None:
    """Draw the objective over each swept key; a line joins the runs that share all other values."""
    measured = [run for run in runs if math.isfinite(run.objective)]
    shown = [key for key in keys if _can_show([run.overrides.get(key, "") for run in measured])]
    if not shown or len(measured) < 2:
        return None
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(max(6.0, 5.0 * columns), 3.9 * lines + 0.4), dpi=150, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for key, ax in zip(shown, axes, strict=False):
        _fill(ax, measured, key, [other for other in keys if other != key], metric)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    return figure


def _fill(ax: Axes, runs: Sequence[SweptRun], key: str, others: Sequence[str], metric: str) -> None:
    positions, names = _positions([run.overrides.get(key, "") for run in runs])
    groups = [", ".join(f"{other}={run.overrides.get(other, '')}" for other in others) for run in runs]
    colors = dict(zip(dict.fromkeys(groups), palette(len(set(groups))), strict=True))
    for group, color in colors.items():
        mine = sorted((positions[n], runs[n].objective) for n, name in enumerate(groups) if name == group)
        x, y = zip(*mine, strict=True)
        joined = len(set(x)) == len(x) > 1
        ax.plot(x, y, color=color, linewidth=1.4 if joined else 0, marker="o", markersize=6, label=group or None)
    numbers = np.array(positions)
    if names is None and numbers.min() > 0 and numbers.max() >= 10 * numbers.min():
        ax.set_xscale("log")
    if names is None and len(set(positions)) <= MAX_TICKS:
        ax.set_xticks(sorted(set(positions)), [f"{place:g}" for place in sorted(set(positions))])
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
    """Return the position of each value on an axis, and the tick labels where values are not numeric."""
    try:
        return [float(value) for value in values], None
    except ValueError:
        names = list(dict.fromkeys(sorted(values)))
        return [float(names.index(value)) for value in values], [name or "(default)" for name in names]


def _can_show(values: Sequence[str]) -> bool:
    return len(set(values)) > 1 and (_positions(values)[1] is None or len(set(values)) <= MAX_NAMES)


def _with_labels(runs: Sequence[SweptRun], keys: Sequence[str]) -> list[SweptRun]:
    """Label the runs by the swept keys where those are unique."""
    names = [", ".join(f"{key}={run.overrides.get(key, '')}" for key in keys) for run in runs]
    if len(set(names)) < len(names):
        return list(runs)
    return [replace(run, record=replace(run.record, label=name)) for run, name in zip(runs, names, strict=True)]


def _ranking(records: Sequence[Record], keys: Sequence[str]) -> tuple[str, str | None, str]:
    """Return the metric that ranks the runs, its mode (None: they cannot be ranked), and a note on the choice.

    Losses, and the rewards and margins that they imply, have a scale of each loss's own, which its hyperparameters change too.
    """
    metric, mode = _objective(records)
    several_losses = len({record.loss for record in records}) > 1 or not {"loss", "online.loss"}.isdisjoint(keys)
    scaling_key = next((key for key in keys if key.startswith("loss.")), None)
    rewards = next((key for key in keys if key in SCALES), None)
    comparable = [name for name in COMPARABLE if rewards is None or name not in OF_REWARDS]
    if metric in comparable or (not several_losses and scaling_key is None and not (rewards and metric in OF_REWARDS)):
        return metric, mode, ""
    scaling_key = rewards if metric in OF_REWARDS else scaling_key
    several = several_losses and not (rewards and metric in OF_REWARDS)
    reason = f"the scale of {metric} " + ("differs between losses" if several else f"depends on {scaling_key}")
    shared = next((name for name in comparable if all(math.isfinite(_last(record, name)) for record in records)), None)
    if shared is None:
        return metric, None, f"Not ranked: {reason}, and the runs have no other metric in common."
    return shared, "max", f"Ranked by {shared}: {reason}."


def _objective(records: Sequence[Record]) -> tuple[str, str]:
    """Return the objective (metric, mode) that most runs measure; a sweep over losses may have several."""
    named = [(str(node.get("metric")), str(node.get("mode"))) for node in (record.node("objective") for record in records)]
    measured = {pair: sum(math.isfinite(_last(record, pair[0])) for record in records) for pair in named}
    return max(measured, key=lambda pair: (measured[pair], named.count(pair)))


def _last(record: Record, metric: str) -> float:
    values = [row[metric] for row in record.evals if isinstance(row.get(metric), (int, float))]
    return float(values[-1]) if values and record.status != "failed" else math.nan


def _rank(value: float, mode: str) -> float:
    if not math.isfinite(value):
        return math.inf
    return -value if mode == "max" else value


def _overrides(run: Path) -> dict[str, str]:
    """Return the overrides of a run's first start, key -> value."""
    pairs = [override.lstrip("+~").partition("=") for override in first_overrides(run)]
    return {key: value for key, _, value in pairs}


def _write_csv(path: Path, runs: Sequence[SweptRun], keys: Sequence[str]) -> None:
    metrics = list(dict.fromkeys(name for run in runs for row in run.record.evals[-1:] for name in row))
    metrics = [name for name in metrics if name not in ("step", "split", "seconds", "examples")]
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    with hidden.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "status", "step", *keys, *(f"eval/{name}" for name in metrics), "seconds"])
        for run in runs:
            record = run.record
            last = record.evals[-1] if record.evals else {}
            values = [last.get(name, "") for name in metrics]
            own = [run.overrides.get(key, "") for key in keys]
            writer.writerow([record.path.name, record.status, record.step, *own, *values, round(record.seconds, 1)])
    os.replace(hidden, path)


def _write(path: Path, text: str) -> None:
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    hidden.write_text(text, encoding="utf-8")
    os.replace(hidden, path)
