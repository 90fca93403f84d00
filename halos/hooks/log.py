"""The run's own record: metrics.jsonl, always written, whatever trackers do."""

import logging

from halos.hooks.base import Hook, Metrics, Run

log = logging.getLogger(__name__)

SHOWN = ("loss", "perplexity", "rewards/accuracies", "rewards/margins", "logps/accuracies", "accuracy", "reward", "kl")


def summary(metrics: Metrics) -> str:
    """A line for people: the few numbers that say how it goes."""
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if metrics.get(name) is not None)


class MetricsLog(Hook):
    """One object a logged step or evaluation, from the first process."""

    def on_step(self, run: Run, metrics: Metrics) -> None:
        if run.main and metrics:
            run.directory.append_metrics(dict(metrics))

    def on_eval(self, run: Run, metrics: Metrics) -> None:
        if run.main:
            run.directory.append_metrics(dict(metrics))
            log.info("step %d of %d, held out: %s", run.step, run.total_steps, summary(metrics))
