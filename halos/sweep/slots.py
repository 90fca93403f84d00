"""What a job is given to run on: GPUs that no other job uses, or a share of the processor's cores."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from halos.errors import UserError


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one job at a time."""

    environment: dict[str, str]


def allocate(devices: Sequence[str], *, processes: int, most: int | None, cores: int, threads: str | None) -> list[Slot]:
    """Places for as many jobs at once as fit, `most` of them where that is given.

    `devices` are GPUs as CUDA_VISIBLE_DEVICES names them, none for jobs on the CPU; `threads` is OMP_NUM_THREADS where the
    user has set it. Raises UserError where what is asked for is not there.
    """
    if devices and processes > len(devices):
        raise UserError(f"a job of this sweep takes {processes} GPUs, and there are {len(devices)}: {', '.join(devices)}")
    room = len(devices) // processes if devices else 1
    if devices and most is not None and most > room:
        raise UserError(
            f"hydra.launcher.max_parallel={most}: {len(devices)} GPUs hold {room} jobs of {processes} processes at a time"
        )
    count = most or room
    places = []
    for number in range(count):
        mine = devices[number * processes : (number + 1) * processes]
        given = {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if devices else {}
        places.append(Slot({**given, "OMP_NUM_THREADS": threads or str(max(1, cores // (count * processes)))}))
    return places


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
