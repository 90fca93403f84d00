"""Reward functions of every kind: one sample or all of a prompt, sync or async, several tasks; and one score of several."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from halos.config.defaults import section
from halos.config.schema import Feedback, Scorer
from halos.errors import UserError
from halos.rollout import feedback
from halos.rollout.collect import InMemory, score, shard
from halos.rollout.ranks import Ranks
from halos.rollout.scorers import _workers
from halos.rollout.scorers._reward_functions import parts_of
from halos.rollout.scorers.function import Functions
from halos.rollout.scores import function_metrics, lack
from halos.rollout.types import Prompt, Rollout, Sample, Score
from tests import processes

ROOT = Path(__file__).resolve().parents[2]
OWN = """
import asyncio, functools, os, subprocess, sys, time

now = most = 0

def rank(completions, rows):
    assert len({row["prompt_id"] for row in rows}) == 1
    return [sorted(completions).index(each) for each in completions]

def short(completions, rows): return [1.0]
def number(completions, rows): return 3
def some(completions, rows): return [None if each == "none" else float("nan") if each == "nan" else 1 for each in completions]

async def crowd(completion, row, *, least):
    global now, most
    now += 1
    most = max(now, most)
    while most < least:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    now -= 1
    return most

async def odd(completion, row):
    if completion == "hang": await asyncio.sleep(600)
    if completion == "block": time.sleep(600)
    if completion == "die": os._exit(7)
    if completion == "cancel": raise asyncio.CancelledError
    if completion == "raise": raise TimeoutError("of mine")
    await asyncio.sleep(0.1)
    return len(completion)

async def mean(completions, rows):
    await asyncio.sleep(0)
    return [sum(map(len, completions)) / len(completions)] * len(completions)

def adds(completion, row): return float(completion == "3") if row["data"]["task"] == "add" else None
def codes(completion, row): return float(len(completion)) if row["data"]["task"] == "code" else None

def spoils(completion, row):
    row["output"] = row["data"]["tests"][0] = "spoilt"
    row["data"]["tests"].append(1)
    return 0
def reads(completion, row): return float(completion == "as it was" and row["data"]["tests"] == [[1]])

def starts(completion, row, *, mark):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(mark, "w") as file: file.write(str(child.pid))
    child.wait()

def yields(completion, row): yield 1.0
def single(completion, rows): return 1.0
def theirs(prompts, completions, **kwargs): return 1.0
def anything(completions, **kwargs): return 1.0
def named(text, record): return 1.0
def unused(completion, _): return 1.0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own")
    (path / "ownkinds.py").write_text(OWN)
    return path


@pytest.fixture(autouse=True)
def importable(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PYTHONPATH", str(place))


def of(*entries: Any, **settings: Any) -> Functions:
    named = [entry if isinstance(entry, str) else dict(entry) for entry in entries]
    own = {"processes": 2, "timeout": 20.0, **settings}
    return Functions(parts_of(named, ["ownkinds"]), section(Scorer, **own), ["ownkinds"])


def prompt(name: str, **data: Any) -> Prompt:
    return Prompt(name, ({"role": "user", "content": "?"},), data=data)


def said(*texts: str, of: str = "p", **data: Any) -> list[Sample]:
    return [Sample(prompt(of, **data), number, text, finish="stop") for number, text in enumerate(texts)]


def scores(functions: Functions, samples: list[Sample]) -> dict[str, Score]:
    try:
        return {each.text: given for each, given in functions.score(samples)}
    finally:
        functions.close()


def test_a_function_of_completions_gets_all_samples_of_a_prompt_whatever_lies_between_them() -> None:
    one, other = said("b", "a", "c", of="one"), said("y", "x", of="other")
    functions = of("ownkinds.rank", {"function": "ownkinds.mean", "weight": 0.0})
    assert functions.needs_groups()
    assert not of("ends", "ownkinds.odd").needs_groups()
    given = scores(functions, [one[0], other[0], one[1], other[1], one[2]])
    assert {text: each.value for text, each in given.items()} == {"b": 1, "a": 0, "c": 2, "y": 1, "x": 0}
    assert given["y"].parts == {"rank": 1.0, "mean": 1.0}


@pytest.mark.parametrize(
    ("name", "problem"),
    [("short", "returned 1 rewards for 2 completions"), ("number", "returned no list of rewards: 3")],
)
def test_a_list_that_is_none_or_of_another_length_costs_the_group_its_score(name: str, problem: str) -> None:
    given = scores(of(f"ownkinds.{name}", processes=1), said("a", "b"))
    assert [each.problem for each in given.values()] == [f"ownkinds.{name} {problem}"] * 2


def test_of_a_group_one_sample_may_be_without_a_score() -> None:
    given = scores(of("ownkinds.some", processes=1), said("a", "none", "nan"))
    assert [(each.value, each.problem) for each in given.values()] == [
        (1.0, ""), (None, "no reward function applies"), (None, "ownkinds.some returned no finite number: nan"),
    ]  # fmt: skip


def test_async_functions_are_called_at_once_and_no_more_than_concurrency() -> None:
    given = scores(of({"function": "ownkinds.crowd", "least": 3}, concurrency=3), said(*map(str, range(8))))
    assert {each.value for each in given.values()} == {3.0}


def test_an_async_function_that_hangs_blocks_or_dies_costs_only_its_own_samples_the_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_workers, "GRACE", 0.5)
    texts = ("a", "hang", "block", "bb", "die", "cancel", "raise", "ccc")
    given = scores(of("ownkinds.odd", concurrency=8, timeout=1.0), said(*texts))
    assert {text: given[text].value for text in texts} == {**dict.fromkeys(texts), "a": 1.0, "bb": 2.0, "ccc": 3.0}
    assert {text: given[text].problem for text in texts if given[text].value is None} == {
        "hang": "took longer than 1 s", "block": "took longer than 1 s", "die": "its process died (exit status 7)",
        "cancel": "its function cancelled itself", "raise": "ownkinds.odd raised TimeoutError: of mine",
    }  # fmt: skip


def test_of_several_tasks_a_function_that_returns_none_takes_no_part() -> None:
    functions = of("ownkinds.adds", {"function": "ownkinds.codes", "weight": 0.5}, processes=1)
    samples = [*said("3", "4", of="a", task="add"), *said("print", of="b", task="code"), *said("so", of="c", task="chat")]
    given = scores(functions, samples)
    assert {text: each.value for text, each in given.items()} == {"3": 1.0, "4": 0.0, "print": 2.5, "so": None}
    assert given["so"].problem == "no reward function applies"
    rollouts = [Rollout(sample, given[sample.text]) for sample in samples]
    assert function_metrics(rollouts) == {
        "function/adds": 0.5, "function/adds/applies": 2 / 3, "function/codes": 5.0, "function/codes/applies": 1 / 3,
    }  # fmt: skip


def test_metrics_of_several_functions_may_be_objectives() -> None:
    several = section(Scorer, functions=["ends", {"function": "length", "target": 1}, {"function": "length", "target": 2}])
    assert Functions.metrics(several) == ("function/ends", "function/length", "function/length~2")
    assert Functions.metrics(section(Scorer, functions=["ends"])) == ()


def test_a_function_sees_nothing_that_another_did_to_the_row() -> None:
    given = scores(of("ownkinds.spoils", "ownkinds.reads", processes=1), said("as it was", tests=[[1]]))
    assert given["as it was"].parts == {"spoils": 0.0, "reads": 1.0}


def test_rows_larger_than_a_pipes_buffer_arrive_and_wait_for_nobody_who_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workers, "GRACE", 0.5)
    samples = said("block", "a", "bb", "ccc", large="x" * 300_000)
    given = scores(of("ownkinds.odd", concurrency=4, timeout=1.0), samples)
    assert [given[each.text].value for each in samples] == [None, 1.0, 2.0, 3.0]


def ended(child: int) -> None:
    until = time.monotonic() + 10
    with suppress(psutil.NoSuchProcess):  # it may end between two looks
        process = psutil.Process(child)
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until, "the process that the function had started goes on"
            time.sleep(0.05)


def test_what_a_function_started_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    given = scores(of({"function": "ownkinds.starts", "mark": str(mark)}, timeout=1.0, processes=1), said("a"))
    assert given["a"].value is None
    ended(int(mark.read_text()))


def test_what_a_function_started_ends_with_a_process_that_is_killed(place: Path, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = (
        "from pathlib import Path; from tests.rollout.test_kinds import of, said\n"
        f"list(of({{'function': 'ownkinds.starts', 'mark': {str(mark)!r}}}, processes=1).score(said('a')))"
    )
    process = processes.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{place}:{ROOT}"})
    until = time.monotonic() + 60
    while not mark.is_file() or not mark.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.wait()
    ended(int(mark.read_text()))


def test_normalised_rewards_are_standardised_in_the_group_and_metrics_stay_raw() -> None:
    """By hand: standard deviations with n - 1, and 1e-4 added; a function that is constant in a group adds nothing."""
    length, ends = {"function": "length", "target": 4, "weight": 2.0}, "ends"
    samples = said("a a a a", "a a", "a", of="p")  # length: 1, 0.5, 0.25, with mean 7/12; ends: 1 for all
    functions = of(length, ends, "ownkinds.adds", aggregation="normalised", processes=1)
    given = scores(functions, [Sample(prompt("p", task="chat"), n, each.output, finish="stop") for n, each in enumerate(samples)])
    deviation = (((5 / 12) ** 2 + (1 / 12) ** 2 + (1 / 3) ** 2) / 2) ** 0.5 + 1e-4
    wanted = [2 * (value - 7 / 12) / deviation for value in (1, 0.5, 0.25)]
    assert [each.normalised for each in given.values()] == pytest.approx(wanted, rel=1e-12)
    assert [each.value for each in given.values()] == [3.0, 2.0, 1.5]
    rollout = Rollout(samples[0], next(iter(given.values())))
    assert (rollout.reward, rollout.learned.reward) == (3.0, pytest.approx(wanted[0]))
    rollouts = [Rollout(sample, score) for sample, score in zip(samples, given.values(), strict=True)]
    made, _ = feedback.make(rollouts, section(Feedback), kind="scalar", seed=0)
    assert [each.to_row()["reward"] for each in made] == pytest.approx(wanted), "what losses learn from"
    assert Rollout.from_row(rollout.to_row(), "here").learned == Rollout.from_row(rollout.learned.to_row(), "here").learned


def test_signatures_that_are_no_reward_are_refused_with_the_two_that_are() -> None:
    kinds = (
        r"and those of a reward \(completion, row, \*, ...\) for one sample, or \(completions, rows, \*, ...\) for all samples"
    )
    for name, message in (
        ("single", rf"its parameters are \(completion, rows\), {kinds}"),
        ("theirs", rf"its parameters are \(prompts, completions, \*\*kwargs\), {kinds}"),
        ("anything", kinds),
        ("named", kinds),
        ("yields", "ownkinds.yields is no reward: it yields"),
    ):
        with pytest.raises(UserError, match=message):
            parts_of([f"ownkinds.{name}"], ["ownkinds"])
    kinds_of = {name: parts_of([f"ownkinds.{name}"], ["ownkinds"])[0] for name in ("unused", "rank", "odd", "mean")}
    assert {name: (each.is_grouped, each.is_async) for name, each in kinds_of.items()} == {
        "unused": (False, False), "rank": (True, False), "odd": (False, True), "mean": (True, True),
    }  # fmt: skip


class Groups:
    """Scores a group by its size; needs groups."""

    def name(self) -> str:
        return "size"

    def needs_groups(self) -> bool:
        return True

    def score(self, samples: Any) -> Any:
        for each in samples:
            yield each, Score(float(sum(other.prompt.id == each.prompt.id for other in samples)))


def test_every_rank_has_whole_groups_and_a_group_that_a_crash_cut_is_scored_whole_again() -> None:
    samples = [each for name in "abc" for each in said("1", "2", "3", of=name)]
    shares = [shard(samples, Ranks(rank, 2), whole_groups=True) for rank in range(2)]
    assert [[each.key for each in share] for share in shares] == [
        [(name, number) for name in names for number in range(3)] for names in ("ac", "b")
    ]
    assert [each.key for each in shard(samples, Ranks(1, 2), whole_groups=False)] == [each.key for each in samples[1::2]]
    store = InMemory[Rollout]()
    store.keep([Rollout(samples[0], Score(3.0))])
    fresh = list(score(samples, Groups(), store))
    assert [each.key for each in fresh] == [each.key for each in samples[1:]], "the score that was there stays"
    assert {each.reward for each in fresh} == {3.0}


def test_samples_without_a_score_are_counted_by_reason() -> None:
    problems = [*["mine raised KeyError: 'a'", "mine raised KeyError: 'b'"] * 2, "took longer than 3 s", "died (exit status 9)"]
    given = [Score(1.0), *(Score(None, problem) for problem in problems)]
    assert lack(given) == (
        "6 of 7 samples have no score: 4 x mine raised KeyError, 1 x took longer than 3 s, 1 x died (the first: mine raised"
        " KeyError: 'a')"
    )
    assert lack([Score(None, "no")] * 2) == "none of 2 samples has a score: 2 x no"
    assert lack([Score(0.0)]) is None
