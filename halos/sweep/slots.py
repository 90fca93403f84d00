"""Slots for jobs: GPUs of their own, or a fraction of the CPU cores."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from halos.errors import UserError


@dataclass(frozen=True, slots=True)
class Slot:
    """The devices of one job at a time, as environment variables."""

    environment: dict[str, str]


def allocate(devices: Sequence[str], *, processes: int, max_parallel: int | None, cores: int, threads: str | None) -> list[Slot]:
    """Return slots for as many parallel jobs as fit, or for `max_parallel`.

    `devices` are GPUs as CUDA_VISIBLE_DEVICES names them, none for jobs on the CPU; `threads` is OMP_NUM_THREADS where the
    user has set it. Raises UserError where there are too few GPUs.
    """
    if devices and processes > len(devices):
        raise UserError(f"a job of this sweep takes {processes} GPUs, and there are {len(devices)}: {', '.join(devices)}")
    capacity = len(devices) // processes if devices else 1
    if devices and max_parallel is not None and max_parallel > capacity:
        raise UserError(
            f"hydra.launcher.max_parallel={max_parallel}: {len(devices)} GPUs fit {capacity} jobs of {processes} processes"
        )
    count = max_parallel or capacity
    slots = []
    for number in range(count):
        own = devices[number * processes : (number + 1) * processes]
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(own)} if devices else {}
        slots.append(Slot({**gpus, "OMP_NUM_THREADS": threads or str(max(1, cores // (count * processes)))}))
    return slots


def cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
