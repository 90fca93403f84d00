"""Schedules: what the peak rate is multiplied by, as a pure function of the step, so that resuming needs nothing but the step.

Steps are counted from 0. Warm-up rises on a line and reaches 1 in its last step. Durations below 1 are a share of all steps,
from 1 on a number of steps. They are functions of the step and of the number of all steps; their other parameters are keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol

from halos.ranges import Range

Duration = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]


def constant(step: int, total: int, *, warmup: Duration) -> float:
    """Stays where warm-up has left it."""
    return _rise(step, num_steps(warmup, total))


def linear(step: int, total: int, *, warmup: Duration, final: Share) -> float:
    """Falls on a line to `final`."""
    first = num_steps(warmup, total)
    return _rise(step, first) if step < first else _fall(1 - _done(step, first, total), final)


def cosine(step: int, total: int, *, warmup: Duration, final: Share) -> float:
    """Falls on half a cosine to `final` (arXiv:1608.03983, without restarts)."""
    first = num_steps(warmup, total)
    return _rise(step, first) if step < first else _fall(0.5 * (1 + math.cos(math.pi * _done(step, first, total))), final)


def wsd(
    step: int, total: int, *, warmup: Duration, decay: Duration, final: Share, shape: Literal["linear", "sqrt"]
) -> float:  # fmt: skip
    """Warm-up, a stable phase, a decay over the last `decay` (arXiv:2404.06395) on a line or as 1 - sqrt (arXiv:2405.18392)."""
    first = num_steps(warmup, total)
    start = max(first, total - num_steps(decay, total))
    if step < start:
        return _rise(step, first)
    done = _done(step, start, total)
    return _fall(1 - (done if shape == "linear" else math.sqrt(done)), final)


def inverse_sqrt(step: int, total: int, *, warmup: Duration) -> float:
    """Falls as 1 / sqrt(step) from where warm-up has left it (arXiv:1706.03762), whatever the number of all steps."""
    first = num_steps(warmup, total)
    return _rise(step, first) if step < first else math.sqrt(max(1, first) / (step + 1))


def num_steps(duration: float, total: int) -> int:
    """Of a duration that is a share of all steps below 1, and from 1 on a number of them."""
    return round(duration * total) if duration < 1 else int(duration)


def _rise(step: int, warmup: int) -> float:
    return (step + 1) / warmup if step < warmup else 1.0


def _done(step: int, first: int, total: int) -> float:
    """The share of what comes from the step `first` on."""
    return (step - first) / max(1, total - first)


def _fall(left: float, final: float) -> float:
    return final + (1 - final) * left


class _Optimizer(Protocol):
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class Rates:
    """The learning rate of every parameter group: each has the peak that the optimizer was made with."""

    def __init__(self, optimizer: _Optimizer, multiplier: Callable[[int, int], float], total: int) -> None:
        self._optimizer, self._multiplier, self._total = optimizer, multiplier, total
        self._peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> None:
        """What the optimizer is to move by in `step`, counted from 0."""
        share = self._multiplier(step, self._total)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
