"""The gallery's page and figure, from what each run measured: means over seeds with their 95 % intervals."""

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure

from halos.report.plots import save

METRICS = ("implicit accuracy", "ranking accuracy", "margin", "drift of chosen", "exact match")
# 0.975 quantiles of Student's t by runs, whose degrees of freedom are one less: 1.96 would be less than half of what three need
QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True, slots=True)
class Measured:
    """One run's metrics."""

    name: str
    seed: int
    metrics: Mapping[str, float]


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t; nan for the half-width of a single value, which has none."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    quantile = QUANTILES[min(len(values), max(QUANTILES))]  # beyond the table: too wide rather than too narrow
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def by_name(rows: Sequence[Measured]) -> dict[str, list[Measured]]:
    return {name: [row for row in rows if row.name == name] for name in sorted({row.name for row in rows})}


def page(rows: Sequence[Measured], start: Mapping[str, float], unfinished: Sequence[str], *, pairs: int, problems: int) -> str:
    """The Markdown page: one line per loss, the start's first, and what did not finish by name."""
    header = ["loss", "seeds", *METRICS]
    own = [f"{start[name]:.3f}" if name in ("ranking accuracy", "exact match") else "" for name in METRICS]
    lines = [header, ["---"] * len(header), ["(the start)", "", *own]]
    for name, runs in by_name(rows).items():
        lines.append([name, str(len(runs)), *[cell([run.metrics[metric] for run in runs]) for metric in METRICS]])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    missing = "".join(f"- {line}\n" for line in unfinished)
    return f"""# Gallery of losses

Mean over seeds ± half of its 95 % interval (Student's t); a single seed has no interval. {pairs} held-out pairs,
{problems} prompts. Accuracies and exact match are shares; margin and drift are nats of a completion.
{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}.

{table}
""" + (f"\nNot in the table, for they have not finished or could not be read:\n\n{missing}" if missing else "")


def cell(values: Sequence[float]) -> str:
    mean, half = over_seeds(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def draw(rows: Sequence[Measured], start: Mapping[str, float], path: Path) -> None:
    """One panel per metric, one line per loss: points are runs, bars the intervals; on white, for light pages and dark ones."""
    groups = by_name(rows)
    figure = Figure(figsize=(13, 1.4 + 0.26 * len(groups)), dpi=150, layout="constrained", facecolor="white")
    for ax, metric in zip(figure.subplots(1, len(METRICS), sharey=True, squeeze=False)[0], METRICS, strict=True):
        ax.axvline(start[metric], color="0.55", linewidth=1, linestyle="--")
        for place, runs in enumerate(groups.values()):
            values = [run.metrics[metric] for run in runs]
            mean, half = over_seeds(values)
            ax.plot(values, [place] * len(values), ".", color="#7aa6d8", markersize=6)
            ax.errorbar(mean, place, xerr=None if math.isnan(half) else half, fmt="o", color="#1f4e8c", markersize=4, capsize=2)
        ax.set_title(metric, fontsize=10, loc="left")
        ax.grid(alpha=0.25, linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_yticks(range(len(groups)), list(groups), fontsize=8)
    figure.axes[0].set_ylim(len(groups) - 0.4, -0.6)
    save(figure, path)
