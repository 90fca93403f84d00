"""The seconds of a round by what they were spent on."""

from __future__ import annotations

import time
from collections.abc import Mapping

SECONDS = "seconds/"  # begins the names of metrics
START = "start"  # of processes: interpreters, imports, launchers, engines, loading of models; and what lies between stages


class Spent:
    """Seconds by name, on from those of earlier attempts. Every moment since this object exists is on one of the names once
    `charge` has been called after it, so that their sum is the time that passed."""

    def __init__(self, earlier: Mapping[str, float]) -> None:
        self.seconds = {START: 0.0, **earlier}
        self._charged = time.perf_counter()  # until when

    def charge(self, name: str, work: float | None) -> None:
        """Charge the time since the last call: `work` of it to `name`, the rest to START; None: all of it to `name`."""
        now = time.perf_counter()
        passed, self._charged = now - self._charged, now
        work = passed if work is None else min(work, passed)
        self.seconds[name] = self.seconds.get(name, 0.0) + work
        self.seconds[START] += passed - work

    def metrics(self) -> dict[str, float]:
        names = sorted(self.seconds, key=lambda name: name == START)  # last
        return {f"{SECONDS}{name}": round(self.seconds[name], 2) for name in names}

    def __str__(self) -> str:
        return ", ".join(f"{value:.3g} {name.removeprefix(SECONDS)}" for name, value in self.metrics().items())
