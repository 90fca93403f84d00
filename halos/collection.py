"""Garbage collection: rare while libraries are imported, which makes 440,000 objects and no garbage, and for tokenising."""

import gc
from functools import cache

RARE = 200_000, 50, 1000  # thresholds of the three generations: a second of CPU time less for torch and transformers
_usual: list[tuple[int, int, int]] = []


def collect_rarely() -> None:
    """Until `freeze_imports`; of a process that is a command, and not a part of the user's own."""
    _usual.append(gc.get_threshold())
    gc.set_threshold(*RARE)


@cache
def freeze_imports() -> None:
    """Exclude what was imported from collection, which would walk it for 0.27 s each time, and transformers' sampling loop
    triggers two at every call; collect as usual from now on."""
    gc.freeze()
    if _usual:
        gc.set_threshold(*_usual.pop())
