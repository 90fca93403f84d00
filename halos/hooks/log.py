"""Writes metrics.jsonl, the run's own record, whatever trackers do."""

import logging

from halos import intervals
from halos.hooks.base import Hook, Metrics, Run

log = logging.getLogger(__name__)

SHOWN = ("loss", "perplexity", "rewards/accuracies", "rewards/margins", "logps/accuracies", "accuracy", "reward", "kl")


def summary(metrics: Metrics, *, objective: str | None = None) -> str:
    """The most telling metrics in one line of text, and `objective`, which the run is watched by."""
    names = [*SHOWN, *(name for name in metrics if name.startswith("pass@") and "/" not in name)]
    names += [objective] if objective is not None and objective not in names else []
    return "  ".join(intervals.shown(name, metrics) for name in names if metrics.get(name) is not None)


def of_sources(metrics: Metrics) -> str:
    """The losses of the sources of the evaluation data, where there are several: ` (loss of math 0.31, chats 0.52)`."""
    names = [name.removesuffix("/examples") for name in metrics if name.endswith("/examples")]
    losses = [f"{name} {loss:.4g}" for name in names if (loss := metrics.get(f"{name}/loss")) is not None]
    return f"  (loss of {', '.join(losses)})" if losses else ""


class MetricsLog(Hook):
    """Appends one JSON object for each logged step or evaluation, on rank 0. Lines that cannot be written are lost, counted and
    reported; the run continues."""

    records = True

    def __init__(self) -> None:
        self._lost = 0

    def on_step(self, run: Run, metrics: Metrics) -> None:
        if run.main and metrics:
            self._append(run, metrics)

    def on_eval(self, run: Run, metrics: Metrics) -> None:
        if run.main:
            self._append(run, metrics)
            text = summary(metrics, objective=run.config.objective.metric) + of_sources(metrics)
            log.info("step %d of %d, held out: %s", run.step, run.total_steps, text)

    def on_end(self, run: Run) -> None:
        if self._lost:
            log.warning("%d lines are missing from metrics.jsonl, which could not be written", self._lost)

    def _append(self, run: Run, metrics: Metrics) -> None:
        try:
            run.directory.append_metrics(dict(metrics))
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                log.warning("metrics.jsonl cannot be written (%s): its lines are lost until it can", error)
