"""Ends a run whose objective metric no longer improves."""

import math
from typing import Any

from halos.hooks.base import Hook, Metrics, Run, Stop


class EarlyStopping(Hook):
    """Stops after `patience` consecutive evaluations without a better objective metric."""

    records = True

    def __init__(self, *, patience: int) -> None:
        self.patience = patience
        self.best: float | None = None
        self.since = 0

    def on_start(self, run: Run) -> None:
        self._stop_if_out_of_patience(run)  # it may have been when a signal stopped the run

    def on_eval(self, run: Run, metrics: Metrics) -> None:
        objective = run.config.objective
        value = metrics.get(objective.metric)
        if value is None:
            return
        better = self.best is None or (value > self.best if objective.mode == "max" else value < self.best)
        better = better and math.isfinite(value)  # nothing would ever improve on nan
        self.best, self.since = (value, 0) if better else (self.best, self.since + 1)
        self._stop_if_out_of_patience(run)

    def _stop_if_out_of_patience(self, run: Run) -> None:
        if self.since >= self.patience and run.step < run.total_steps:
            metric = run.config.objective.metric
            was = "has been nan" if self.best is None else f"has not improved on {self.best:.4g}"
            reason = f"{metric} {was} for {self.patience} evaluations"
            run.stop = Stop(reason, finished=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.since = state.get("best"), state.get("since", 0)
