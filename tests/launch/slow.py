"""A hook that sleeps after each step, so that something can happen meanwhile; loaded with plugins=[slow]."""

import time
from typing import Annotated

from halos.hooks.base import Hook, Metrics, Run
from halos.types import Range


class Slow(Hook):
    def __init__(self, *, seconds: Annotated[float, Range(least=0)]) -> None:
        self.seconds = seconds

    def on_step(self, run: Run, metrics: Metrics) -> None:
        time.sleep(self.seconds)
