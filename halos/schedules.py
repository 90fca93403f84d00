"""Learning rate schedules: a multiplier of the peak learning rate, as a pure function of the step, so that nothing need be saved.

Steps count from 0. Warm-up is linear and reaches 1 in its last step; a decay would reach `final` in step `total`, one after the
last. A duration below 1 is a fraction of all steps; from 1 on it is a number of steps. A schedule takes the step and the total
number of steps; its keyword-only parameters are its YAML keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol

from halos.ranges import Range

Duration = Annotated[float, Range(least=0, whole_from=1)]
Fraction = Annotated[float, Range(least=0, most=1)]


def constant(step: int, total: int, *, warmup: Duration) -> float:
    """Constant after warm-up."""
    return _rise(step, num_steps(warmup, total))


def linear(step: int, total: int, *, warmup: Duration, final: Fraction) -> float:
    """Linear decay to `final`."""
    first = num_steps(warmup, total)
    return _rise(step, first) if step < first else _fall(1 - _done(step, first, total), final)


def cosine(step: int, total: int, *, warmup: Duration, final: Fraction) -> float:
    """Cosine decay to `final` (arXiv:1608.03983, without restarts)."""
    first = num_steps(warmup, total)
    return _rise(step, first) if step < first else _fall(0.5 * (1 + math.cos(math.pi * _done(step, first, total))), final)


def wsd(
    step: int, total: int, *, warmup: Duration, decay: Duration, final: Fraction, shape: Literal["linear", "sqrt"]
) -> float:  # fmt: skip
    """Warm-up, stable phase, decay over the last `decay` steps (arXiv:2404.06395), linear or 1 - sqrt (arXiv:2405.18392)."""
    first = num_steps(warmup, total)
    start = max(first, total - num_steps(decay, total))
    if step < start:
        return _rise(step, first)
    done = _done(step, start, total)
    return _fall(1 - (done if shape == "linear" else math.sqrt(done)), final)


def inverse_sqrt(step: int, total: int, *, warmup: Duration) -> float:
    """Decay as 1 / sqrt(step) after warm-up (arXiv:1706.03762). With `warmup` in steps it does not depend on `total`."""
    first = num_steps(warmup, total)
    return _rise(step, first) if step < first else math.sqrt(max(1, first) / (step + 1))


def num_steps(duration: float, total: int) -> int:
    """A duration in steps: below 1 it is a fraction of `total`, from 1 on a number of steps."""
    return round(duration * total) if duration < 1 else int(duration)


def _rise(step: int, warmup: int) -> float:
    return (step + 1) / warmup if step < warmup else 1.0


def _done(step: int, first: int, total: int) -> float:
    """The fraction of the steps from `first` on that is done."""
    return (step - first) / max(1, total - first)


def _fall(left: float, final: float) -> float:
    """From 1 down to `final`, where `left` goes from 1 to 0."""
    return final + (1 - final) * left


class _Optimizer(Protocol):
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class LearningRates:
    """Sets the learning rate of every parameter group; the peak of each is the one that the optimizer was made with."""

    def __init__(self, optimizer: _Optimizer, multiplier: Callable[[int, int], float], total: int) -> None:
        self._optimizer, self._multiplier, self._total = optimizer, multiplier, total
        self._peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> None:
        """Set the learning rates of `step`, counted from 0."""
        factor = self._multiplier(step, self._total)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
