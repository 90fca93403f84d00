"""Word problems in small numbers, with worked right and wrong solutions: bundled data on which a tiny model learns in minutes."""

import operator
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

NUM_PROBLEMS = {"eval": 400, "train": 4800}  # in this order of one stream, so that no question is in both
MISTAKES = ("sum", "answer", "operator", "number")
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ivy", "Jon", "Kim", "Leo")
THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "keys", "maps", "pens", "shells", "stamps", "toys")
VERBS = {"+": ("buys", "finds", "gets", "wins"), "-": ("drops", "lends", "loses", "sells")}
ASKS = ("How many {things} does {name} have now?", "How many {things} is that?")

_APPLY = {"+": operator.add, "-": operator.sub}
_OTHER = {"+": "-", "-": "+"}
_ANSWER = re.compile(r"#### (-?[0-9]{1,9})\s*\Z")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its right solution, a wrong one, and which of MISTAKES that makes; `answer` is the right number."""

    question: str
    solution: str
    wrong: str
    mistake: str
    answer: int


def problems(split: str) -> list[Problem]:
    """The same problems for ever: `train` or `eval`, without a question in common. As many of each mistake, plus and minus.

    Raises ValueError for another split. Numbers recur in both splits; what is held out is the problem as a whole.
    """
    if split not in NUM_PROBLEMS:
        raise ValueError(f"no split '{split}'; arithmetic has {' and '.join(NUM_PROBLEMS)}")
    rng = random.Random(20240229)
    drawn: dict[str, Problem] = {}
    while len(drawn) < sum(NUM_PROBLEMS.values()):
        number = len(drawn)
        problem = _problem(rng, MISTAKES[number % 4], "+-"[number // 4 % 2])
        drawn.setdefault(problem.question, problem)
    num_eval = NUM_PROBLEMS["eval"]
    return list(drawn.values())[:num_eval] if split == "eval" else list(drawn.values())[num_eval:]


def answer(text: str) -> int | None:
    """The number in the `#### 12` that ends a solution, GSM8K's convention; None where it does not end so."""
    found = _ANSWER.search(text)
    return int(found[1]) if found else None


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Preference pairs, prompt + chosen + rejected; they serve demonstrations and labels too."""
    for problem in problems(split):
        yield {
            "prompt": [{"role": "user", "content": problem.question}],
            "chosen": [{"role": "assistant", "content": problem.solution}],
            "rejected": [{"role": "assistant", "content": problem.wrong}],
        }


def _problem(rng: random.Random, mistake: str, sign: str) -> Problem:
    while True:
        left, right = _operands(rng, sign)
        result = _APPLY[sign](left, right)
        wrong = _spoiled(rng, mistake, left, sign, right)
        if wrong is not None and answer(wrong) != result:
            break
    name, things = _pick(rng, NAMES), _pick(rng, THINGS)
    asked = _pick(rng, ASKS).format(name=name, things=things)
    question = f"{name} has {left} {things} and {_pick(rng, VERBS[sign])} {right}. {asked}"
    return Problem(question, _worked(left, sign, right, result, result), wrong, mistake, result)


def _spoiled(rng: random.Random, mistake: str, left: int, sign: str, right: int) -> str | None:
    """A wrong solution, None where these numbers allow none.

    Whatever is wrong is drawn as the right one is, so the two cannot be told apart without reading the question.
    """
    result = _APPLY[sign](left, right)
    if mistake == "answer":  # contradicts the working
        return _worked(left, sign, right, result, _APPLY[sign](*_operands(rng, sign)))
    if mistake == "sum":
        result = _APPLY[sign](*_operands(rng, sign))
        return _worked(left, sign, right, result, result)
    if mistake == "operator":
        sign = _OTHER[sign]
    elif rng.random() < 0.5:
        left = _digit(rng)
    else:
        right = _digit(rng)
    result = _APPLY[sign](left, right)
    return _worked(left, sign, right, result, result) if result >= 0 else None


def _operands(rng: random.Random, sign: str) -> tuple[int, int]:
    """Two digits from 2 (`1 apples` is no English) whose result is not negative."""
    while True:
        left, right = _digit(rng), _digit(rng)
        if _APPLY[sign](left, right) >= 0:
            return left, right


def _worked(left: int, sign: str, right: int, result: int, final: int) -> str:
    return f"{left} {sign} {right} = {result}\n#### {final}"


def _digit(rng: random.Random) -> int:
    return _pick(rng, range(2, 10))


def _pick(rng: random.Random, choices: Sequence[T]) -> T:
    # random() alone is promised to give the same numbers in every Python version; choice and shuffle are not.
    return choices[int(rng.random() * len(choices))]
