"""Verifiable rewards: correct, and isolated from the run."""

import multiprocessing
import sys
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest

from halos.config.defaults import section
from halos.config.schema import Scorer
from halos.errors import UserError
from halos.online import rewards as online
from halos.rollout import rewards
from halos.rollout.scorers._reward_functions import Part, parts_of
from halos.rollout.scorers._workers import work
from halos.rollout.scorers.function import Functions
from halos.rollout.types import Prompt, Sample

ROW = {"solution": "2 + 2 = 4\n#### 4", "finish": "stop", "tokens": 90}
PROMPT = Prompt("p", ({"role": "user", "content": "2 + 2?"},), columns={"solution": ROW["solution"]})

MINE = """
import os, time

def good(completion, row, *, times: float = 1.0):
    return times * len(completion)

def odd(completion, row):
    if completion == "raise":
        raise ValueError("no such thing")
    if completion == "hang":
        time.sleep(600)
    if completion == "die":
        os._exit(7)
    return float("nan") if completion == "nan" else None if completion == "none" else 1

def unlucky(completion, row, *, mark):
    try:
        open(f"{mark}-{completion}", "x").close()
    except FileExistsError:
        return len(completion)
    os.kill(os.getpid(), 9)

def positional(completion, row, extra): ...
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "ownrewards.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "ownrewards", raising=False)
    return "ownrewards"


def scores(functions: Functions, *texts: str) -> dict[str, Any]:
    found = {each.text: score for each, score in functions.score([said(text) for text in texts])}
    functions.close()
    return found


def said(text: str) -> Sample:
    return Sample(PROMPT, 0, text, finish="stop", tokens=90)


def of(*entries: Any, plugins: tuple[str, ...] = (), timeout: float = 5.0) -> Functions:
    return Functions(parts_of(entries, plugins), section(Scorer, processes=2, timeout=timeout), plugins)


def test_the_bundled_rewards() -> None:
    assert rewards.exact_match("so\n#### 4", ROW) == 1
    assert rewards.exact_match("so\n#### 5", ROW) == rewards.exact_match("4", ROW) == 0
    assert rewards.exact_match("#### 1,200", {"solution": "#### 1200"}) == 1
    assert rewards.last_number("It is 4.", ROW) == 1
    assert rewards.last_number("9007199254740993", {"solution": "9007199254740992"}) == 0
    assert rewards.last_number("4 or 5", ROW) == rewards.last_number("four", ROW) == 0
    assert rewards.maths("The answer is $\\frac{8}{2}$", ROW) == 1
    assert rewards.maths("#### 5", ROW) == 0
    assert rewards.length("a b c d", ROW, target=4) == 1
    assert rewards.length("a b", ROW, target=4) == 0.5
    assert [rewards.overlong("", {"tokens": n}, limit=100, buffer=20) for n in (80, 90, 100, 150)] == [0, -0.5, -1, -1]
    assert (rewards.ends("", ROW), rewards.ends("", {"finish": "length"})) == (1, 0)
    with pytest.raises(KeyError, match="the data has no solution"):
        rewards.exact_match("4", {})


@pytest.mark.parametrize(
    ("answer", "solution", "right"),
    [
        ("1,000", "1,000", 1), ("1000", "1,000", 1), ("1,000", "1000", 1), ("5.", "5.", 1), ("5", 5.0, 1), ("5.50", "5.5", 1),
        ("1,00,000", "100000", 1), ("-0", "0", 1), ("+7", "7", 1), (".5", "0.5", 1), ("6", "5 #### 6", 1), ("5", "5 #### 6", 0),
        ("Paris.", "Paris", 1), ("$1,000", "$1000", 1), ("x #### 4 #### 5", "5", 1), ("9007199254740993", "9007199254740992", 0),
        ("3,5", "35", 0), ("0,125", "125", 0), ("$5", "5", 0), ("5%", "5", 0), ("5 km", "5", 0), ("1e3", "1000", 0),
        ("nan", "nan", 1), ("inf", "1e999999999", 0), ("1e999999999", "1e999999998", 0), ("1/2", "0.5", 0), ("Paris", "5", 0),
    ],
)  # fmt: skip
def test_exact_match_compares_both_sides_by_one_rule(answer: str, solution: str | float, right: int) -> None:
    for solved in (solution, f"so\n#### {solution}"):
        assert rewards.exact_match(f"so\n#### {answer}", {"solution": solved}) == right, solved


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### -2 ", "-2"),
        ("so 7", None),
        ("#### 7\nmore", None),
        ("#### 7.", "7"),
        ("x #### 5 #### 6", "6"),
        ("####\n8", "8"),
        ("#### ", None),
    ],
)
def test_an_answer_is_what_a_text_ends_with(text: str, answer: str | None) -> None:
    assert rewards.final_answer(text) == answer


def test_our_rewards_keep_the_name_by_which_users_and_files_know_them() -> None:
    assert online.exact_match is rewards.exact_match
    public = {name for name, part in vars(rewards).items() if isfunction(part) and not name.startswith("_")}
    assert set(online.__all__) == public
    for typed in ("ends", "halos.online.rewards.ends"):
        functions = of({"function": typed, "weight": 0.5})
        assert functions.name() == "0.5 halos.online.rewards.ends"
        assert functions.request()["functions"][0][:2] == ["halos.online.rewards.ends", 0.5]
    assert scores(functions, "so")["so"].value == 0.5


def test_an_error_in_a_function_costs_only_its_own_sample_the_score(mine: str) -> None:
    found = scores(of(f"{mine}.odd", plugins=(mine,), timeout=1.0), "fine", "raise", "hang", "die", "nan", "none", "too")
    assert (found["fine"].value, found["too"].value) == (1.0, 1.0)
    for text, words in {
        "raise": "raised ValueError: no such thing", "hang": "took longer than 1 s", "die": "its process died (exit",
        "nan": "odd returned no finite number: nan", "none": "no reward function applies",
    }.items():  # fmt: skip
        assert found[text].value is None
        assert words in found[text].problem


def test_a_process_that_dies_for_reasons_of_its_own_costs_nobody_a_score(mine: str, tmp_path: Path) -> None:
    entry = {"function": f"{mine}.unlucky", "mark": str(tmp_path / "mark")}
    found = scores(of(entry, plugins=(mine,)), "a", "bb", "ccc")
    assert {text: score.value for text, score in found.items()} == {"a": 1.0, "bb": 2.0, "ccc": 3.0}


def test_a_process_that_died_while_it_was_idle_is_replaced(mine: str) -> None:
    functions = of(f"{mine}.good", plugins=(mine,))
    assert [score.value for _, score in functions.score([said("ab")])] == [2.0]
    for worker in functions._pools[False].workers:
        worker.process.kill()
        worker.process.join()
    assert [score.value for _, score in functions.score([said("abc")])] == [3.0]
    functions.close()


def test_several_are_added_up_with_their_weights(mine: str) -> None:
    parts = ({"function": f"{mine}.good", "times": 2.0, "weight": 0.5}, {"function": "ends"})
    found = scores(of(*parts, plugins=(mine,)), "abc")["abc"]
    assert found.value == 0.5 * 6 + 1
    assert found.parts == {"good": 6.0, "ends": 1.0}
    twice = scores(of({"function": "length", "target": 1}, {"function": "length", "target": 2}), "one")["one"]
    assert twice.parts == {"length": 1.0, "length~2": 0.5}


def test_scores_are_of_the_code_that_a_users_function_imports_too(mine: str, tmp_path: Path) -> None:
    (tmp_path / "ownhelper.py").write_text("TIMES = 1\n")
    with (tmp_path / "ownrewards.py").open("a") as file:
        file.write("from ownhelper import TIMES\n")

    def request() -> dict[str, Any]:
        for name in ("ownrewards", "ownhelper"):
            sys.modules.pop(name, None)  # as in a new process
        return of(f"{mine}.good", "ends", plugins=(mine,)).request()

    before = request()
    assert request() == before
    (tmp_path / "ownhelper.py").write_text("TIMES = 20\n")
    assert request() != before
    assert of("ends").request().keys() == {"functions", "timeout", "aggregation"}


def test_a_worker_that_would_import_edited_code_is_not_started(mine: str, tmp_path: Path) -> None:
    (tmp_path / "ownlater.py").write_text("TIMES = 1\n")
    with (tmp_path / "ownrewards.py").open("a") as file:
        file.write("\ndef helped(completion, row):\n    from ownlater import TIMES\n    return TIMES\n")
    functions = of(f"{mine}.helped", plugins=(mine,))
    assert [score.value for _, score in functions.score([said("a")])] == [1.0]
    (tmp_path / "ownlater.py").write_text("TIMES = 20\n")
    assert [score.value for _, score in functions.score([said("b")])] == [1.0], "by the worker that is there"
    functions.close()
    with pytest.raises(UserError, match=r"code of the reward ownrewards.helped has been edited since .*: start a new process"):
        list(functions.score([said("c")]))


def test_workers_stay_for_the_next_call(mine: str) -> None:
    functions = of(f"{mine}.good", plugins=(mine,))
    for _ in range(2):
        assert [score.value for _, score in functions.score([said("ab")])] == [2.0]
        workers = list(functions._pools[False].workers)
    assert functions._pools[False].workers == workers
    functions.close()


def test_wrong_entries_are_refused(mine: str) -> None:
    for entry, words in (
        ("exact_macth", "did you mean exact_match"),
        ({"function": "length"}, "lacks target"),
        ({"function": "length", "target": 3, "tagret": 4}, "takes no 'tagret'; it takes target"),
        ({"function": "exact_match", "weight": "much"}, "weight='much' is no number"),
        (f"{mine}.good", r"outside halos: if you trust that package, add plugins=\[ownrewards\]"),
        (7, "a reward is a name"),
    ):
        with pytest.raises(UserError, match=words):
            parts_of([entry], [])
    with pytest.raises(UserError, match=r"is no reward: its parameters are \(completion, row, extra\), and those of"):
        parts_of([f"{mine}.positional"], [mine])
    with pytest.raises(UserError, match="cannot be imported"):
        parts_of(["halos.nowhere.good"], [])
    with pytest.raises(UserError, match="name one"):
        parts_of([], [])


def test_a_worker_that_cannot_import_a_function_says_so_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-not-a-key")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "brokenrewards.py").write_text("import os\nraise RuntimeError(os.environ['MY_API_KEY'])\n")
    _, worker_end = multiprocessing.Pipe()
    with pytest.raises(SystemExit):
        work(worker_end, {0: Part("brokenrewards.one", 1.0, {})}, [], None)
    assert "RuntimeError: <MY_API_KEY>" in capsys.readouterr().err
