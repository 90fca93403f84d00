"""Sample, then score: the step that a live loop takes at once, and rounds by halves, each a stage that can be gone on with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from halos.rollout.engines.engine import Engine
from halos.rollout.ranks import Ranks
from halos.rollout.scorers.scorer import Scorer
from halos.rollout.types import Key, Request, Rollout, Sample

TOGETHER = 64  # scores that are kept together, where they cost only time

Item = TypeVar("Item", Sample, Rollout)


class Store(Protocol[Item]):
    """Where samples or scores are kept as they come, by key."""

    def has(self, key: Key) -> bool: ...

    def keep(self, items: Sequence[Item]) -> None: ...


class InMemory(Generic[Item]):
    """For as long as a step takes."""

    def __init__(self) -> None:
        self.items: dict[Key, Item] = {}

    def has(self, key: Key) -> bool:
        return key in self.items

    def keep(self, items: Sequence[Item]) -> None:
        self.items.update({item.key: item for item in items})


def collect(
    requests: Sequence[Request], engine: Callable[[], AbstractContextManager[Engine]], scorer: Scorer, ranks: Ranks
) -> list[Rollout]:
    """Every process samples and scores its share; all get the whole, in the order of the requests.

    The engine is opened on every process, whatever its share, since opening may gather weights; it is closed before scoring.
    """
    samples, rollouts = InMemory[Sample](), InMemory[Rollout]()
    mine = requests[ranks.rank :: ranks.world]
    with engine() as opened:
        for _ in sample([mine], opened, samples):
            pass
    for _ in score(list(samples.items.values()), scorer, rollouts):
        pass
    everyone = {key: rollout for part in ranks.gather(rollouts.items) for key, rollout in part.items()}
    return [everyone[request.key] for request in requests]


def sample(chunks: Iterable[Sequence[Request]], engine: Engine, store: Store[Sample]) -> Iterator[Sample]:
    """Samples of the chunks in which something is missing, as they come.

    A chunk is sampled whole and kept when it is whole, so that after any crash the same requests stand beside each other, and
    give the same texts; answers that are paid for are kept one by one, and none is asked for twice.
    """
    for chunk in chunks:
        missing = [request for request in chunk if not store.has(request.key)]
        if not missing:
            continue
        fresh = []
        for each in engine.sample(missing if engine.is_paid else chunk):
            yield each
            if not store.has(each.key):
                fresh.append(each)
            if engine.is_paid:
                store.keep(fresh)
                fresh = []
        store.keep(fresh)


def score(samples: Sequence[Sample], scorer: Scorer, store: Store[Rollout]) -> Iterator[Rollout]:
    """Rollouts of the samples that have no score in the store, as they come."""
    fresh = []
    for each, scored in scorer.score([each for each in samples if not store.has(each.key)]):
        rollout = Rollout(each, replace(scored, scorer=scorer.name()))
        yield rollout
        fresh.append(rollout)
        if len(fresh) >= TOGETHER:
            store.keep(fresh)
            fresh = []
    store.keep(fresh)
