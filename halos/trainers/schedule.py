"""The learning rate as a pure function of the step, so that resuming needs nothing but the step."""

import math

from halos.config.schema import Schedule


def warmup_steps(schedule: Schedule, total: int) -> int:
    """`warmup` below 1 is a share of all steps, from 1 on a number of steps."""
    return round(schedule.warmup * total) if schedule.warmup < 1 else int(schedule.warmup)


def multiplier(schedule: Schedule, step: int, total: int) -> float:
    """What the peak rate is multiplied by in step `step` (counted from 0) of `total`.

    Warm-up rises on a line and reaches 1 in its last step; then `constant`, or down to `final` on a line or half a cosine.
    """
    warmup = warmup_steps(schedule, total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    left = 1 - done if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.final + (1 - schedule.final) * left
