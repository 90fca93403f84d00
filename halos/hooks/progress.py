"""A progress bar: step, loss, speed, time left."""

import sys

from tqdm import tqdm

from halos.hooks.base import Hook, Metrics, Run


class ProgressBar(Hook):
    """On rank 0; updated every 30 s where the output is a log file rather than a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_start(self, run: Run) -> None:
        if run.main:
            every = 0.2 if sys.stderr.isatty() else 30.0
            self._bar = tqdm(total=run.total_steps, initial=run.step, desc="train", unit="step", mininterval=every)

    def on_step(self, run: Run, metrics: Metrics) -> None:
        if self._bar is not None:
            if metrics:
                self._bar.set_postfix({"loss": f"{metrics['loss']:.4f}"}, refresh=False)
            self._bar.update(run.step - self._bar.n)

    def on_end(self, run: Run) -> None:
        if self._bar is not None:
            self._bar.close()
