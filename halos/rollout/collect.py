"""Sample, then score. A live loop does both in one call; rounds do each in a stage of its own, which can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from halos.errors import UserError
from halos.rollout.engines.engine import Engine
from halos.rollout.ranks import Ranks
from halos.rollout.scorers.scorer import Scorer
from halos.rollout.scores import ScoringError
from halos.rollout.types import Key, Prompt, Request, Rollout, Sample

STORED_AT_ONCE = 64  # answers or scores: what a crash can lose
STORED_EVERY = 5.0  # seconds, of answers that come one by one

Item = TypeVar("Item", Sample, Rollout)
Keyed = TypeVar("Keyed", Request, Sample)


class Store(Protocol[Item]):
    """Storage for samples or rollouts by key, written as they come."""

    def has(self, key: Key) -> bool: ...

    def keep(self, items: Sequence[Item]) -> None: ...


class InMemory(Generic[Item]):
    """A store that lives as long as one step."""

    def __init__(self) -> None:
        self.items: dict[Key, Item] = {}

    def has(self, key: Key) -> bool:
        return key in self.items

    def keep(self, items: Sequence[Item]) -> None:
        self.items.update({item.key: item for item in items})


def collect(
    requests: Sequence[Request],
    engine: Callable[[], AbstractContextManager[Engine]],
    scorer: Scorer,
    ranks: Ranks,
    seconds: dict[str, float],
) -> list[Rollout]:
    """Every rank samples and scores its shard of the requests; all get all rollouts, in the order of the requests. A scorer that
    is paid scores all on rank 0.

    `seconds` grows by what was spent on `sample`, until the last rank had its samples, and on `score`, until all had scores.

    The engine is opened on every rank, even one with an empty shard, since opening may all-gather weights; it is closed before
    scoring.
    """
    samples, rollouts, began = InMemory[Sample](), InMemory[Rollout](), time.perf_counter()
    mine = shard(requests, ranks, whole_groups=scorer.needs_groups())
    with engine() as opened:
        for _ in sample([mine], opened, samples):
            pass
    sampling = time.perf_counter() - began
    own = list(samples.items.values()) if not scorer.is_paid else _on_rank_0(samples.items, requests, ranks)
    problem = None
    try:
        for _ in score(own, scorer, rollouts):
            pass
    except UserError as error:
        problem = str(error)
    # prompts are on every rank already, and their data may be large
    bare = {key: _of_prompt(rollout, Prompt(rollout.prompt.id, ())) for key, rollout in rollouts.items.items()}
    parts = ranks.gather((bare, sampling, problem))
    for _, _, problem in parts:
        if problem is not None:  # on every rank, so that none waits for another
            raise ScoringError(problem)
    slowest, passed = max(sampling for _, sampling, _ in parts), time.perf_counter() - began
    for name, spent in (("sample", min(slowest, passed)), ("score", max(0.0, passed - slowest))):
        seconds[name] = seconds.get(name, 0.0) + spent
    every = {key: rollout for items, _, _ in parts for key, rollout in items.items()}
    return [_of_prompt(every[request.key], request.prompt) for request in requests]


def _on_rank_0(own: Mapping[Key, Sample], requests: Sequence[Request], ranks: Ranks) -> list[Sample]:
    """The samples of all ranks, on rank 0; none on the others."""
    bare = {key: replace(sample, prompt=Prompt(sample.prompt.id, ())) for key, sample in own.items()}
    every = {key: sample for part in ranks.gather(bare) for key, sample in part.items()}
    return [replace(every[request.key], prompt=request.prompt) for request in requests] if ranks.main else []


def _of_prompt(rollout: Rollout, prompt: Prompt) -> Rollout:
    return replace(rollout, sample=replace(rollout.sample, prompt=prompt))


def shard(items: Sequence[Keyed], ranks: Ranks, *, whole_groups: bool) -> list[Keyed]:
    """A rank's share of requests or samples; with `whole_groups` all of a prompt are in one share."""
    if not whole_groups:
        return list(items[ranks.rank :: ranks.world])
    groups: dict[str, list[Keyed]] = {}
    for item in items:
        groups.setdefault(item.prompt.id, []).append(item)
    return [item for group in list(groups.values())[ranks.rank :: ranks.world] for item in group]


def sample(chunks: Iterable[Sequence[Request]], engine: Engine, store: Store[Sample]) -> Iterator[Sample]:
    """Yield samples of every chunk that is incomplete in the store.

    Where the engine's answers depend on the other requests of a call, a chunk is sampled as a whole and stored when it is
    complete, so that after a crash the same requests share a batch and give the same texts. Any other engine gets all requests
    at once, so that a slow one holds no other back, and its answers are stored as they come.
    """
    if not engine.shares_batches:
        yield from _as_they_come([request for chunk in chunks for request in chunk if not store.has(request.key)], engine, store)
        return
    for chunk in chunks:
        if all(store.has(request.key) for request in chunk):
            continue
        fresh = []
        for each in engine.sample(chunk):
            yield each
            if not store.has(each.key):
                fresh.append(each)
        store.keep(fresh)


def _as_they_come(missing: Sequence[Request], engine: Engine, store: Store[Sample]) -> Iterator[Sample]:
    """Store answers that are paid for one by one, so that none is requested twice, and others a few at a time."""
    fresh, stored = list[Sample](), time.monotonic()
    try:
        for each in engine.sample(missing) if missing else ():
            fresh.append(each)
            if engine.is_paid or len(fresh) >= STORED_AT_ONCE or time.monotonic() - stored > STORED_EVERY:
                store.keep(fresh)
                fresh, stored = [], time.monotonic()
            yield each
    finally:
        store.keep(fresh)


def score(samples: Sequence[Sample], scorer: Scorer, store: Store[Rollout]) -> Iterator[Rollout]:
    """Yield rollouts of the samples that have no score in the store."""
    fresh = list[Rollout]()
    for each, given in scorer.score(to_score(samples, scorer, store)):
        rollout = Rollout(each, replace(given, scorer=scorer.name()))
        if len(fresh) >= STORED_AT_ONCE and not (scorer.needs_groups() and fresh[-1].prompt.id == rollout.prompt.id):
            store.keep(fresh)
            fresh = []
        if store.has(rollout.key):
            continue
        yield rollout
        fresh.append(rollout)
    store.keep(fresh)


def to_score(samples: Sequence[Sample], scorer: Scorer, store: Store[Rollout]) -> list[Sample]:
    """The samples that have no score in the store; where the scorer needs groups, with the others of their prompts."""
    without = [each for each in samples if not store.has(each.key)]
    if not scorer.needs_groups():
        return without
    prompts = {each.prompt.id for each in without}
    return [each for each in samples if each.prompt.id in prompts]
