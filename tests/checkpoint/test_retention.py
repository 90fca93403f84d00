"""Retention: which checkpoints may be deleted."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from conftest import SMALL
from hypothesis import given, settings

import train
from halos.checkpoint import commit, known_good, manifest, pruner, select
from halos.checkpoint.preflight import judged_by_earlier
from halos.checkpoint.pruner import Pruner
from halos.errors import UserError
from halos.hooks.base import Stop
from halos.hooks.checkpoint import CheckpointHook
from halos.hooks.retention import Retention
from halos.trainers.base import Trainer


def policy(
    keep_last: int, keep_best: int, *, largest: bool = True, keep_every: int | None = None, pinned: Sequence[int] = ()
) -> Retention:
    return Retention(keep_last, keep_best, keep_every, frozenset(pinned), largest)


def test_the_newest_and_the_best_are_kept() -> None:
    scores = {10: 0.9, 20: 0.5, 30: 0.7, 40: None, 50: 0.6}
    assert policy(1, 2).expendable(scores, max(scores)) == [20, 40]
    assert policy(2, 1, largest=False).expendable(scores, max(scores)) == [10, 30]


def test_of_equal_scores_the_newer_is_kept() -> None:
    assert policy(1, 1).expendable({1: 0.5, 2: 0.5, 3: 0.1}, 3) == [1]


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_never_wins(bad: float, largest: bool) -> None:
    assert policy(1, 1, largest=largest).expendable({1: bad, 2: 0.5, 3: bad, 4: bad}, 4) == [1, 3]


def test_the_newest_checkpoint_that_is_known_to_be_good_is_kept_besides() -> None:
    scores = dict.fromkeys(range(10, 60, 10))
    assert policy(1, 0).expendable(scores, 50) == [10, 20, 30, 40]
    assert policy(1, 0).expendable(scores, 35) == [10, 20, 40]
    assert policy(3, 0).expendable(scores, 35) == [10, 20], "it is one of the last three as it is"
    assert policy(1, 0).expendable(scores, -1) == [10, 20, 30, 40]


def test_multiples_of_keep_every_and_pinned_steps_are_permanent() -> None:
    scores = dict.fromkeys(range(10, 110, 10))
    assert policy(1, 0, keep_every=40, pinned=[10, 70]).expendable(scores, max(scores)) == [20, 30, 50, 60, 90]


def test_the_most_that_lie_there_at_once() -> None:
    assert policy(2, 1).max_on_disk(range(100, 1001, 100)) == 4
    assert policy(2, 1, keep_every=500, pinned=[100]).max_on_disk(range(100, 1001, 100)) == 7
    assert policy(2, 1).max_on_disk([100]) == 1


@settings(deadline=None)  # machines may be busy
@given(
    st.dictionaries(st.integers(0, 99), st.none() | st.floats(), min_size=1, max_size=12),
    st.integers(0, 5),
    st.integers(0, 5),
    st.booleans(),
    st.integers(-1, 99),
)
def test_never_fewer_than_one_and_the_bound_holds(
    scores: dict[int, float | None], last: int, best: int, largest: bool, good: int
) -> None:
    kept = set(scores) - set(policy(last, best, largest=largest).expendable(scores, good))
    assert max(scores) in kept
    assert len(kept) <= max(1, last) + best + 1
    if known := [step for step in scores if step <= good]:
        assert max(known) in kept
    scored = [value for value in scores.values() if value is not None and math.isfinite(value)]
    if best and scored:
        assert (max if largest else min)(scored) in [scores[step] for step in kept]


# --- the hook, over random histories of saves, crashes, restarts and damage ----------------------------------------------


class CrashError(Exception):
    """Simulates SIGKILL."""


@dataclass
class Saved:
    """A checkpoint on the disk of the model-based test."""

    score: float | None
    good: bool  # its weights are finite
    contents: bool = True  # its contents are unchanged
    sizes: bool = True


@dataclass
class World:
    """A disk in memory with a run that saves, evaluates, crashes and resumes, while files get damaged."""

    seed: int
    disk: dict[int, Saved] = field(default_factory=dict)
    step: int = 0
    num_retained: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        every = self.chance.choice([1, 2, 5])
        self.knobs: dict[str, Any] = {
            "every": every,
            "keep_last": self.chance.randint(1, 3),
            "keep_best": self.chance.randint(0, 2),
            "keep_every": self.chance.choice([None, 3 * every]),
            "pinned": sorted(self.chance.sample(range(1, 40), self.chance.randint(0, 2))),
        }
        self.largest = self.chance.random() < 0.5
        objective = SimpleNamespace(metric="loss", mode="max" if self.largest else "min")
        self.run: Any = SimpleNamespace(
            main=True, step=0, finite_at=-1, config=SimpleNamespace(objective=objective),
            directory=SimpleNamespace(checkpoints=Path("disk"), read_metrics=list),
        )  # fmt: skip
        self.record = known_good.KnownGood()
        self.broken = False  # the current weights are
        self.crash_after: int | None = None  # deletions
        self.start()

    # what the pruner sees

    def checkpoints(self, _: Path) -> list[Path]:
        return [Path("disk") / select.name_of(step) for step in sorted(self.disk)]

    def verify(self, path: Path, *, contents: bool = True) -> list[manifest.Fault]:
        saved = self.disk[select.step_of(path)]
        return [] if saved.sizes and (saved.contents or not contents) else [manifest.Fault("file", "damaged")]

    def score_of(self, path: Path, *_: Any) -> float | None:
        return self.disk[select.step_of(path)].score

    def discard(self, paths: Sequence[Path]) -> Callable[[], None]:
        for number, path in enumerate(paths):
            if number == self.crash_after:
                raise CrashError
            del self.disk[select.step_of(path)]
        return lambda: None

    def read(self, _: Any) -> known_good.KnownGood:
        return self.record

    def write(self, _: Any, record: known_good.KnownGood) -> None:
        self.record = record

    # events

    def whole(self) -> set[int]:
        return {step for step, saved in self.disk.items() if saved.contents and saved.sizes}

    def start(self) -> None:
        self.run.step = self.step = max(self.whole(), default=0)
        if self.step in self.disk and not self.disk[self.step].good and self.chance.random() < 0.5:  # the run failed over it
            self.run.step = self.step = max((step for step in self.whole() if step <= self.record.until), default=0)
            self.disk = {step: saved for step, saved in self.disk.items() if step <= self.step}
        self.broken = self.step in self.disk and not self.disk[self.step].good
        self.run.finite_at = -1
        self.hook = CheckpointHook(
            **self.knobs, on_full_disk="warn", async_save=False, merge_lora=True, merge_dtype="auto", at_end=False
        )
        self.pruner = Pruner(self.run, self.hook)
        self.pruner.start()
        self.trusted = self.whole()  # by this attempt

    def train(self) -> None:
        if not self.broken:
            self.run.finite_at = self.step
            self.broken = self.chance.random() < 0.03
        self.run.step = self.step = self.step + 1
        self.retain(self.pruner.note_good)
        if self.hook.due(self.run):
            self.save()

    def save(self) -> None:
        crash = self.chance.random()
        if crash < 0.05:  # before the rename
            return self.start()
        score = self.chance.choice([None, math.nan, math.inf, *[round(self.chance.random(), 1)] * 6])
        self.disk[self.step] = Saved(score, good=not self.broken)
        if crash < 0.1:  # before retention
            return self.start()
        self.trusted.add(self.step)
        self.crash_after = self.chance.randint(0, 2) if crash < 0.2 else None
        saved = self.step
        self.num_retained += 1
        self.retain(lambda: self.pruner.saved(saved))
        self.crash_after = None

    def retain(self, act: Callable[[], None]) -> None:
        before = dict(self.disk)
        try:
            act()
        except CrashError:
            self.check(before, finished=False)
            assert max(self.disk) == max(before)  # no work is lost
            self.start()
        else:
            if before.keys() != self.disk.keys():
                self.check(before, finished=True)

    def damage(self) -> None:
        if self.disk:
            step = self.chance.choice(sorted(self.disk))
            kind = self.chance.choice(["contents", "sizes", "gone"])
            if kind == "gone":
                del self.disk[step]
            else:
                setattr(self.disk[step], kind, False)

    def permanent(self, step: int) -> bool:
        every = self.knobs["keep_every"]
        return step in self.knobs["pinned"] or (every is not None and step % every == 0)

    def check(self, before: dict[int, Saved], *, finished: bool) -> None:
        """Check what retention did to `before`, independently of the function that decides it."""
        counted = {step for step in self.trusted & before.keys() if before[step].sizes}
        kept, gone = counted & self.disk.keys(), before.keys() - self.disk.keys()
        assert kept, "there was one, and now there is none"  # whose bytes may have changed unseen since it was written
        known = {step for step in counted if step <= self.record.until}
        assert all(before[step].good for step in known), "what was called good is not"
        assert not known or max(known) in kept, "the last that is known to be good is gone"
        assert gone <= counted, "what is damaged or was never verified is not ours to delete"
        assert not any(map(self.permanent, gone))
        for step in gone:
            assert sum(other > step for other in kept) >= self.knobs["keep_last"]
            if self.finite(before[step].score):
                better = [other for other in kept if self.rank(before, other) > self.rank(before, step)]
                assert len(better) >= self.knobs["keep_best"]
        if finished:
            bound = self.knobs["keep_last"] + self.knobs["keep_best"] + (max(counted) not in known)
            assert sum(not self.permanent(step) for step in kept) <= bound

    @staticmethod
    def finite(score: float | None) -> bool:
        return score is not None and math.isfinite(score)

    def rank(self, before: dict[int, Saved], step: int) -> tuple[float, int]:
        score = before[step].score
        if score is None or not math.isfinite(score):
            return (-math.inf, step)
        return (score if self.largest else -score, step)


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], World]:
    """Make worlds, and let the pruner work on their disks."""
    here: list[World] = []
    replaced = (
        (select, "checkpoints"),
        (manifest, "verify"),
        (select, "score_of"),
        (commit, "discard"),
        (known_good, "read"),
        (known_good, "write"),
    )
    for module, name in replaced:
        monkeypatch.setattr(module, name, lambda *args, name=name, **kw: getattr(here[-1], name)(*args, **kw))
    monkeypatch.setattr(pruner.log, "disabled", True)

    def make(seed: int) -> World:
        world = object.__new__(World)
        here[:] = [world]
        world.__init__(seed)  # type: ignore[misc]  # its disk is looked at while it is made
        return world

    return make


@pytest.mark.parametrize("histories", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_history_loses_what_must_be_kept(histories: int, worlds: Callable[[int], World]) -> None:
    retained = 0
    for seed in range(histories):
        world = worlds(seed)
        for _ in range(20):
            world.chance.choices([world.train, world.damage, world.start], [20, 1, 1])[0]()
        retained += world.num_retained
    assert retained > 4 * histories


def test_a_run_that_goes_on_from_an_earlier_checkpoint_knows_of_none_after_it_and_doubts_none(
    worlds: Callable[[int], World],
) -> None:
    world = worlds(0)
    world.disk, world.run.step, world.record = {2: Saved(None, good=True)}, 2, known_good.KnownGood(6, doubted_at=9)
    world.pruner.start()
    assert world.record == known_good.KnownGood(2)


LOSSES = {0: 5.0, 2: 1.0, 4: 3.0, 6: 4.0}
WITH_BEST = ["loss=sft", "train.steps=7", "train.batch_size=4", "train.eval_every=2", "train.eval_at_start=true",
             "checkpoint.every=2", "checkpoint.keep_last=1", "checkpoint.keep_best=1", "objective.metric=loss",
             "objective.mode=min", "resume=auto"]  # fmt: skip


@pytest.mark.parametrize("stopped_at", [None, 2, 3, 4])
def test_a_run_that_was_stopped_keeps_the_checkpoints_of_one_that_was_not(
    stopped_at: int | None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop saves before the evaluation that is due, and at steps at which no other run saves."""
    one_step, stops = Trainer.step, [stopped_at]

    def step(self: Trainer, indices: Any) -> Any:
        totals = one_step(self, indices)
        if self.run.step in stops:
            stops.clear()
            self.run.stop = Stop("a signal", finished=False)
        return totals

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "_eval_means", lambda self: {"loss": LOSSES.get(self.run.step, 9.0)})
    command = [*SMALL, *WITH_BEST, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]
    for status in [0] if stopped_at is None else [1, 0]:
        assert train.start(command) == status
    assert [select.step_of(path) for path in select.checkpoints(tmp_path / "run" / "checkpoints")] == [2, 6]


# --- settings ----------------------------------------------------------------------------------------------------------


def hook(**knobs: Any) -> CheckpointHook:
    given = {"every": 100, "keep_last": 1, "keep_best": 0, "keep_every": None, "pinned": [], "on_full_disk": "warn"}
    return CheckpointHook(**{**given, "async_save": False, "merge_lora": True, "merge_dtype": "auto", "at_end": False, **knobs})


@pytest.mark.parametrize(
    ("every", "eval_every", "before", "remedy"),
    [
        (30, 20, ", step 30 by 20", "checkpoint.every=40 or train.eval_every=15"),
        (50, 100, "", "checkpoint.every=100 or train.eval_every=50"),
        (7, 5, ", step 7 by 5", "checkpoint.every=10 or train.eval_every=1 "),
    ],
)
def test_checkpoints_that_are_judged_by_an_earlier_evaluation_are_a_warning(
    every: int, eval_every: int, before: str, remedy: str
) -> None:
    said = judged_by_earlier(hook(every=every, keep_best=2), eval_every, 1000)
    assert said is not None
    assert said.startswith(
        f"checkpoint.keep_best=2: checkpoint.every={every} is no multiple of train.eval_every={eval_every}, so"
    )
    assert f"the last one before them{before}: {remedy}" in said
    assert judged_by_earlier(hook(every=every), eval_every, 1000) is None, "nothing is judged"
    assert judged_by_earlier(hook(every=every, keep_best=2), eval_every, every) is None, "the only save is the end's"
    assert judged_by_earlier(hook(every=every * eval_every, keep_best=2), eval_every, 1000) is None
    assert judged_by_earlier(hook(every=None, keep_best=2), eval_every, 1000) is None


def test_pinned_steps_are_saved_whatever_the_interval() -> None:
    steps = [1, 50, 100, 150, 200]
    due = [step for step in steps if hook(pinned=[50]).due(SimpleNamespace(step=step))]  # type: ignore[arg-type]
    assert due == [50, 100, 200]
    assert [step for step in steps if hook(every=None, pinned=[50]).due(SimpleNamespace(step=step))] == [50]  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [100, None])
def test_an_interval_that_would_keep_nothing_is_refused(every: int | None) -> None:
    with pytest.raises(UserError, match="keep_every=250"):
        hook(every=every, keep_every=250)
