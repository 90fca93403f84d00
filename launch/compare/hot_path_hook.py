"""The hook by which hot_path.py measures a run of halos, started with its public command."""

import os
from pathlib import Path
from typing import Any

import torch
from hot_path_meter import Meter, resident_mib

from halos.hooks.base import Hook, Metrics, Run


class MeterHook(Hook):
    """Writes `output` after the last step. `inner` and `outer` are those of the matrix product that is timed in `dtype`."""

    def __init__(self, *, output: str, inner: int, outer: int, dtype: str) -> None:
        self.output, self.meter, self.tokens = Path(output), Meter((inner, outer), getattr(torch, dtype)), 0

    def on_start(self, run: Run) -> None:
        earlier = resident_mib("VmHWM") if run.reference_cpu_seconds else 0.0  # the peak of loading included
        self.meter.begin(run.model, prepared=run.reference_cpu_seconds, earlier_peak=earlier)
        set_rate = run.learning_rates.set

        def step_begins(step: int) -> Any:
            self.meter.step_begins()  # a step sets its learning rate before all else
            return set_rate(step)

        run.learning_rates.set = step_begins  # type: ignore[method-assign]

    def on_step(self, run: Run, metrics: Metrics) -> None:
        self.meter.step_ends(run.tokens - self.tokens)
        self.tokens = run.tokens
        if run.step == run.total_steps:
            self.meter.write(self.output)
            os._exit(0)  # the final model, which takes gigabytes of disk for nothing, is not written
