"""Waits of ranks for each other that may take as long as they like: over the store by which they have met, not in a collective,
which a time limit would end. Signals are handled meanwhile, and the watchdog ends a rank that waits for a dead one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch.distributed as dist

PERIOD = 0.1  # seconds between two looks at the store

_calls = itertools.count()


class Store(Protocol):
    """What is used of torch's store: calls that return at once."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

    def add(self, key: str, value: int) -> int: ...


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 does what is inside, then the others do, and at the end all wait for the last one. Every rank calls, equally often.

    An error of rank 0 inside is for the caller to catch and to share; where it ends rank 0, the others are ended with it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    with first(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(), str(next(_calls))):
        yield


@contextmanager
def first(store: Store, rank: int, world: int, call: str) -> Iterator[None]:
    """As `rank_0_first`, for this `rank` of so many; `call` names this turn."""
    begun, done = f"halos/turn/{call}", f"halos/turn/{call}/done"
    while rank and not store.check([begun]):
        time.sleep(PERIOD)
    yield
    if not rank:
        store.set(begun, "")
    store.add(done, 1)
    while store.add(done, 0) < world:
        time.sleep(PERIOD)
