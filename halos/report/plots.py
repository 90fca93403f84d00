"""Figures of runs: learning curves, rewards, learning rate and gradient norm."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from halos import intervals
from halos.report.read import Record, series

MAX_RAW_CURVES = 6  # with more curves in a panel, only the smoothed ones are drawn
MIN_POINTS_TO_SMOOTH = 20  # fewer points are drawn as they are
EVAL_STYLE: dict[str, Any] = {"linewidth": 1.3, "linestyle": "--", "marker": "o", "markersize": 4.5, "markeredgecolor": "white"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One metric over the steps, for every run that has it."""

    metrics: tuple[str, ...]  # the first one that a run has
    title: str
    level: float | None = None  # of a dotted line for comparison
    bounds: tuple[float, float] | None = None
    has_evals: bool = True
    runs: Callable[[Record], bool] = lambda record: True

    def of(self, records: Sequence[Record]) -> list[tuple[Record, str]]:
        """Return the runs that the panel shows, each with its metric."""
        pairs = [(record, name) for record in records if self.runs(record) for name in self.metrics if _has(record, name)]
        return [pair for i, pair in enumerate(pairs) if pair[0] not in [other for other, _ in pairs[:i]]]


REWARDS = (
    Panel(("rewards/accuracies", "accuracy"), "Reward accuracy", level=0.5, bounds=(-0.02, 1.02)),
    Panel(("rewards/margins",), "Reward margin, chosen − rejected", level=0.0),
    Panel(("reward",), "Reward"),
    Panel(("win_rate",), "Win rate against the first policy", level=0.5),
    Panel(("kl",), "KL to the reference, estimated, nats", level=0.0),
    Panel(("entropy",), "Entropy, nats"),
    Panel(("clip_fraction",), "Fraction of clipped tokens"),
    Panel(("length",), "Length of completions, tokens"),
    Panel(("unique",), "Fraction of a prompt's samples that differ"),
)
OPTIMIZER = (
    Panel(("lr",), "Learning rate", has_evals=False),
    Panel(("grad_norm",), "Gradient norm, before clipping", has_evals=False),
)
SECONDS = tuple(
    Panel((f"seconds/{name}",), f"Seconds of {what}", has_evals=False)
    for name, what in (("sample", "sampling"), ("score", "scoring"), ("train", "training"), ("start", "starting processes"))
)


def plot(records: Sequence[Record], output: Path) -> list[Path]:
    """Write the figures for which the runs have numbers, and return their paths."""
    output.mkdir(parents=True, exist_ok=True)
    drawn = []
    figures: dict[str, Sequence[Panel]] = {
        "learning_curves": learning_curves(records), "rewards": [*REWARDS, *passes(records)], "optimizer": OPTIMIZER,
        "seconds": SECONDS,
    }  # fmt: skip
    for name, panels in figures.items():
        if figure := draw(records, panels):
            drawn.append(save(figure, output / f"{name}.png"))
    return drawn


def learning_curves(records: Sequence[Record]) -> list[Panel]:
    """Return a panel per loss, since different losses share no scale."""
    losses = dict.fromkeys(record.loss for record in records)
    return [Panel(("loss",), f"{name} loss", runs=lambda record, name=name: record.loss == name) for name in losses]


def passes(records: Sequence[Record]) -> list[Panel]:
    """Return a panel per pass@k."""
    names = dict.fromkeys(name for record in records for row in record.evals for name in row if re.fullmatch(r"pass@\d+", name))
    return [Panel((name,), f"{name}, held out", bounds=(-0.02, 1.02)) for name in names]


def draw(records: Sequence[Record], panels: Sequence[Panel]) -> Figure | None:
    """Draw the panels for which any run has numbers, with one legend; None where there are none."""
    shown = [panel for panel in panels if panel.of(records)]
    if not shown:
        return None
    colors = dict(zip([record.label for record in records], palette(len(records)), strict=True))  # the same in each figure
    drawn = {record.label for panel in shown for record, _ in panel.of(records)}
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    width = max(6.8, 5.2 * columns)
    legend = 0.2 * -(-len(drawn) // _legend_columns(list(drawn), width))  # inches, which many runs would take from the panels
    figure = Figure(figsize=(width, 3.9 * lines + 0.6 + legend), dpi=150, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, ax in zip(shown, axes, strict=False):
        _fill(ax, panel, [(record, name, colors[record.label]) for record, name in panel.of(records)])
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    _runs_legend(figure, {label: color for label, color in colors.items() if label in drawn})
    if any(panel.has_evals and len(series(record.evals, name)[0]) for panel in shown for record, name in panel.of(records)):
        _splits_legend(figure, thin=any(line.get_alpha() for ax in axes for line in ax.get_lines()))
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """Smooth a curve by a Gaussian whose width is a fraction of its length; centred, so that it does not lag. nan is ignored."""
    width = max(1.5, len(values) / 40)
    reach = np.arange(-int(4 * width), int(4 * width) + 1)
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    weight = np.convolve(known.astype(float), kernel, mode="same")
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 1e-6)


def _fill(ax: Axes, panel: Panel, curves: Sequence[tuple[Record, str, str]]) -> None:
    seen = [np.empty(0)]
    for record, name, color in curves:
        steps, values = series(record.train, name)
        trend = smooth(values) if len(values) >= MIN_POINTS_TO_SMOOTH and panel.metrics != ("lr",) else values
        if trend is not values and len(curves) <= MAX_RAW_CURVES:
            ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.28)
            known = values[np.isfinite(values)]
            seen.append(np.percentile(known, [2, 98]) if len(known) else known)
        ax.plot(steps, trend, color=color, linewidth=2, marker="o" if len(steps) == 1 else "", solid_capstyle="round")
        seen.append(trend)
        if panel.has_evals:
            steps, values = series(record.evals, name)
            ax.plot(steps, values, color=color, **EVAL_STYLE)
            seen += [values, *_interval(ax, record, name, color)]
    _style(ax, panel, np.concatenate(seen))
    if all(record.is_online_run for record, _, _ in curves):
        ax.set_xlabel("round")
    first, last = ax.get_xlim()
    if last - first < 1:  # a single step: no fractions at the ticks
        ax.set_xlim(first - 1, last + 1)


def _interval(ax: Axes, record: Record, name: str, color: str) -> list[np.ndarray]:
    """Draw the confidence interval of each evaluation: a band, and a line at each point, which a single one has too."""
    steps, low = series(record.evals, name + intervals.LOW)
    _, high = series(record.evals, name + intervals.HIGH)
    if len(low) == len(high) > 0:
        ax.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
        ax.vlines(steps, low, high, color=color, linewidth=0.8, alpha=0.5)
    return [low, high]


def _style(ax: Axes, panel: Panel, seen: np.ndarray) -> None:
    ax.set_title(panel.title, fontsize=11, loc="left")
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.grid(alpha=0.25, linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
    if panel.level is not None:
        ax.axhline(panel.level, color="0.45", linewidth=0.9, linestyle=":", zorder=0)
    seen = seen[np.isfinite(seen)]
    if panel.bounds:
        ax.set_ylim(panel.bounds)
    elif panel.metrics == ("grad_norm",) and len(seen) and 0 < seen.min() * 100 < seen.max():
        ax.set_yscale("log")
    elif panel.metrics == ("lr",):
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter("{x:.2g}")
    elif len(seen) and seen.max() > seen.min():
        # a few spikes of the raw curve may be cut off; the trend and the evaluations never are
        padding = 0.07 * (seen.max() - seen.min())
        ax.set_ylim(seen.min() - padding, seen.max() + padding)


def _runs_legend(figure: Figure, palette: dict[str, str]) -> None:
    names = [_escaped(label) for label in palette]
    if len(names) == 1:
        figure.suptitle(names[0], x=0.01, ha="left", fontsize=12, fontweight="bold")
        return
    handles = [Line2D([], [], color=color, linewidth=3) for color in palette.values()]
    columns = _legend_columns(names, figure.get_figwidth())
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _legend_columns(names: Sequence[str], width: float) -> int:
    """How many names fit beside each other into `width` inches."""
    return max(1, min(len(names), int(width / (0.9 + 0.075 * max(map(len, names))))))


def _splits_legend(figure: Figure, *, thin: bool) -> None:
    handles = [Line2D([], [], color="0.35", linewidth=2), Line2D([], [], color="0.35", **EVAL_STYLE)]
    names = ["train, smoothed (thin: as logged)" if thin else "train", "held out"]
    figure.legend(handles, names, loc="outside upper right", ncols=2, frameon=False, fontsize=9)


def _escaped(label: str) -> str:
    """Escape dollar signs, which start mathematics, and a leading underscore, which would hide the legend entry."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")


def palette(count: int) -> list[str]:
    """Return `count` distinguishable colors."""
    if count <= 10:
        return [to_hex(colormaps["tab10"](i)) for i in range(count)]
    return [to_hex(colormaps["turbo"](position)) for position in np.linspace(0.05, 0.95, count)]


def _has(record: Record, name: str) -> bool:
    return any(name in row for row in (*record.train, *record.evals))


def save(figure: Figure, path: Path) -> Path:
    """Save a figure, completely or not at all."""
    hidden = path.with_name(f".{path.name}")
    figure.savefig(hidden, format="png")
    os.replace(hidden, path)
    return path
