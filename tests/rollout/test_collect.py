"""From prompts to rollouts: sampling and scoring together, and each alone with a store that outlives it."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from halos.errors import UserError
from halos.rollout.collect import InMemory, collect, sample, score
from halos.rollout.ranks import Ranks
from halos.rollout.scores import ScoringError
from halos.rollout.types import Origin, Prompt, Request, Rollout, Sample, Score, requests_for

ORIGIN = Origin("policy")
PROMPTS = [Prompt(f"p{n}", ({"role": "user", "content": str(n)},)) for n in range(3)]
REQUESTS = requests_for(PROMPTS, samples=2, temperature=1.0, max_new_tokens=4, seed=0)


class Echo:
    """Answers in the reverse order; dies after so many answers."""

    def __init__(self, *, is_paid: bool = False, shares_batches: bool = False, dies_after: int | None = None) -> None:
        self.is_paid, self.shares_batches, self.dies_after = is_paid, shares_batches, dies_after
        self.asked = list[list[Any]]()

    def sample(self, requests: Sequence[Request]) -> Iterator[Sample]:
        self.asked.append([request.key for request in requests])
        for number, request in enumerate(reversed(requests)):
            if number == self.dies_after:
                raise RuntimeError
            yield Sample.of(request, ORIGIN, f"{request.prompt.id} {request.number}", finish="stop", tokens=1)


class Last:
    """The last character as a number."""

    is_paid = False

    def name(self) -> str:
        return "last"

    def request(self) -> dict[str, Any]:
        return {}

    def needs_groups(self) -> bool:
        return False

    def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
        for each in reversed(samples):
            yield each, Score(float(each.text[-1]))


class Second(Ranks):
    """Of two processes, of which the first has sampled and scored its share."""

    first: ClassVar[dict[Any, Rollout]] = {}

    def gather(self, mine: Any) -> list[Any]:
        return [(self.first, 7.0, None), mine]


class Threads(Ranks):
    """Ranks that are threads of this process."""

    values: ClassVar[dict[int, Any]] = {}
    barrier_of_both: ClassVar[threading.Barrier] = threading.Barrier(2, timeout=20)

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier_of_both.wait()
        every = [self.values[rank] for rank in range(self.world)]
        self.barrier_of_both.wait()
        return every


def test_every_request_has_its_rollout_in_the_order_of_the_requests() -> None:
    happened = list[str]()

    @contextmanager
    def engine() -> Iterator[Echo]:
        yield Echo()
        happened.append("closed")

    class Scores(Last):
        def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
            assert happened == ["closed"], "weights that were gathered are gone when a reward model loads"
            return super().score(samples)

    rollouts = collect(REQUESTS, engine, Scores(), Ranks(0, 1), {})
    assert [rollout.key for rollout in rollouts] == [request.key for request in REQUESTS]
    said = [(each.sample.text, each.reward, each.score.scorer) for each in rollouts[:2]]
    assert said == [("p0 0", 0.0, "last"), ("p0 1", 1.0, "last")]


def test_a_rank_samples_its_shard_and_opens_the_engine_even_for_an_empty_one() -> None:
    engines = list[Echo]()

    @contextmanager
    def engine() -> Iterator[Echo]:
        engines.append(Echo())
        yield engines[-1]

    Second.first.update({each.key: each for each in collect(REQUESTS[::2], engine, Last(), Ranks(0, 1), {})})
    rollouts = collect(REQUESTS, engine, Last(), Second(1, 2), {})
    assert engines[-1].asked == [[request.key for request in REQUESTS[1::2]]]
    assert [rollout.key for rollout in rollouts] == [request.key for request in REQUESTS]
    assert len(collect(REQUESTS[:1], engine, Last(), Second(1, 2), {})) == 1
    assert (len(engines), engines[-1].asked) == (3, []), "all processes gather weights together"


def test_an_engine_whose_answers_depend_on_nothing_else_gets_all_requests_at_once_and_what_came_is_kept() -> None:
    store, chunks = InMemory[Sample](), [[request] for request in REQUESTS]
    store.keep(list(Echo().sample(REQUESTS[:1])))
    with pytest.raises(RuntimeError):
        list(sample(chunks, Echo(dies_after=3), store))
    assert store.items.keys() == {request.key for request in (REQUESTS[0], *REQUESTS[3:])}
    engine = Echo()
    list(sample(chunks, engine, store))
    assert engine.asked == [[request.key for request in REQUESTS[1:3]]]


def test_a_paid_scorer_scores_the_samples_of_all_ranks_on_rank_0_and_its_refusal_ends_every_rank() -> None:
    scored = list[tuple[int, int]]()

    class Paid(Last):
        is_paid = True

        def __init__(self, rank: int, cap: int | None = None) -> None:
            self.rank, self.cap = rank, cap

        def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
            scored.append((self.rank, len(samples)))
            assert all(each.prompt.turns for each in samples), "which it asks about"
            if self.cap is not None and samples:
                raise UserError("the cap is reached")
            return super().score(samples)

    @contextmanager
    def engine() -> Iterator[Echo]:
        yield Echo()

    def both(cap: int | None) -> list[Any]:
        def run(rank: int) -> Any:
            return collect(REQUESTS, engine, Paid(rank, cap), Threads(rank, 2), {})

        with ThreadPoolExecutor(2) as threads:
            return [each.exception() or each.result() for each in [threads.submit(run, rank) for rank in (0, 1)]]

    one, other = both(None)
    assert one == other
    assert [rollout.key for rollout in one] == [request.key for request in REQUESTS]
    assert sorted(scored) == [(0, 6), (1, 0)]
    assert [str(each) for each in both(0)] == ["the cap is reached"] * 2
    assert all(isinstance(each, ScoringError) for each in both(0)), "so that a run saves a checkpoint before it ends"


def test_a_rank_samples_all_of_a_prompt_where_a_score_depends_on_its_other_samples() -> None:
    asked, seen = Echo(), list[list[Any]]()

    @contextmanager
    def engine() -> Iterator[Echo]:
        yield asked

    class OfGroups(Last):
        def needs_groups(self) -> bool:
            return True

        def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
            seen.append(sorted(each.key for each in samples))
            return super().score(samples)

    others = [request for request in REQUESTS if request.prompt.id != "p1"]
    Second.first.update({each.key: each for each in collect(others, engine, OfGroups(), Ranks(0, 1), {})})
    asked.asked.clear()
    seen.clear()
    rollouts = collect(REQUESTS, engine, OfGroups(), Second(1, 2), {})
    assert [rollout.key for rollout in rollouts] == [request.key for request in REQUESTS]
    assert asked.asked == [[("p1", 0), ("p1", 1)]]
    assert seen == [[("p1", 0), ("p1", 1)]]


def test_an_incomplete_chunk_is_sampled_again_as_a_whole_and_no_complete_one() -> None:
    store, chunks = InMemory[Sample](), [REQUESTS[:2], REQUESTS[2:4], REQUESTS[4:]]
    store.keep(list(Echo().sample(REQUESTS[:2])))
    before = dict(store.items)
    with pytest.raises(RuntimeError):
        list(sample(chunks, Echo(shares_batches=True, dies_after=1), store))
    assert store.items == before, "what stood in an unfinished chunk is drawn again, beside the same requests"
    store.keep(list(Echo().sample(REQUESTS[2:3])))  # of a start whose chunks were other ones
    engine = Echo(shares_batches=True)
    list(sample(chunks, engine, store))
    assert engine.asked == [[request.key for request in chunk] for chunk in chunks[1:]]
    assert len(store.items) == 6


def test_a_paid_answer_is_stored_at_once_and_not_requested_again() -> None:
    store = InMemory[Sample]()
    with pytest.raises(RuntimeError):
        list(sample([REQUESTS[:4]], Echo(is_paid=True, dies_after=3), store))
    assert len(store.items) == 3
    engine = Echo(is_paid=True)
    list(sample([REQUESTS[:4]], engine, store))
    assert engine.asked == [[REQUESTS[0].key]]


def test_only_samples_without_a_score_are_scored() -> None:
    samples = list(Echo().sample(REQUESTS))
    store = InMemory[Rollout]()
    store.keep([Rollout(samples[0], Score(9.0))])
    assert len(list(score(samples, Last(), store))) == 5
    assert len(store.items) == 6
    assert store.items[samples[0].key].reward == 9.0


def test_seconds_are_of_sampling_until_the_last_rank_is_done_and_then_of_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("halos.rollout.collect.time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: 0.0))

    class Slow(Last):
        def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
            now[0] += 2.0
            yield from super().score(samples)

    @contextmanager
    def engine() -> Iterator[Echo]:
        now[0] += 4.0
        yield Echo()

    class Waited(Ranks):
        def gather(self, mine: Any) -> list[Any]:
            now[0] += 5.0  # for the other, which samples for 7 s and scores for 4
            return [mine, ({}, 7.0, None)]

    spent = {"score": 1.0}
    collect(REQUESTS, engine, Slow(), Waited(0, 1), spent)
    assert spent == {"sample": 7.0, "score": 1.0 + 4.0}, "11 seconds of two ranks, beside what was spent before"
