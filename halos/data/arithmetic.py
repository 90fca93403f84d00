"""Word problems in small numbers, with worked right and wrong solutions: bundled data on which a tiny model learns in minutes."""

import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
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


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its right solution, a wrong one with the MISTAKE that it makes, and the right answer."""

    question: str
    solution: str
    wrong: str
    mistake: str
    answer: int


def problems(split: str) -> list[Problem]:
    """Return the problems of a split, `train` or `eval`: always the same, balanced over mistakes and operators.

    No question is in both splits, though numbers recur in both. Raises ValueError for another split.
    """
    if split not in NUM_PROBLEMS:
        raise ValueError(f"no split '{split}'; arithmetic has {' and '.join(NUM_PROBLEMS)}")
    num_eval = NUM_PROBLEMS["eval"]
    drawn = _drawn(sum(NUM_PROBLEMS.values()))
    return list(drawn[:num_eval] if split == "eval" else drawn[num_eval:])


@cache
def _drawn(count: int) -> tuple[Problem, ...]:
    """The first `count` problems, those of both splits, in the order drawn."""
    rng = random.Random(20240229)
    drawn: dict[str, Problem] = {}
    while len(drawn) < count:
        number = len(drawn)
        problem = _problem(rng, MISTAKES[number % 4], "+-"[number // 4 % 2])
        drawn.setdefault(problem.question, problem)
    return tuple(drawn.values())


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Yield preference pairs, prompt + chosen + rejected, which also serve as demonstrations and as labels."""
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
        wrong = _wrong_solution(rng, mistake, left, sign, right)
        if wrong is not None and wrong[1] != result:
            break
    name, things = _pick(rng, NAMES), _pick(rng, THINGS)
    ask = _pick(rng, ASKS).format(name=name, things=things)
    question = f"{name} has {left} {things} and {_pick(rng, VERBS[sign])} {right}. {ask}"
    return Problem(question, _solution(left, sign, right, result, result), wrong[0], mistake, result)


def _wrong_solution(rng: random.Random, mistake: str, left: int, sign: str, right: int) -> tuple[str, int] | None:
    """Return a wrong solution and its answer, which may be right by chance; None where these numbers allow none.

    The wrong part has the distribution of the right one, so that a solution cannot be recognised without its question.
    """
    result = _APPLY[sign](left, right)
    if mistake == "answer":  # contradicts the working
        final = _APPLY[sign](*_operands(rng, sign))
        return _solution(left, sign, right, result, final), final
    if mistake == "sum":
        result = _APPLY[sign](*_operands(rng, sign))
        return _solution(left, sign, right, result, result), result
    if mistake == "operator":
        sign = _OTHER[sign]
    elif rng.random() < 0.5:
        left = _digit(rng)
    else:
        right = _digit(rng)
    result = _APPLY[sign](left, right)
    return (_solution(left, sign, right, result, result), result) if result >= 0 else None


def _operands(rng: random.Random, sign: str) -> tuple[int, int]:
    """Draw two digits from 2 on (`1 apples` is not English) whose result is not negative."""
    while True:
        left, right = _digit(rng), _digit(rng)
        if _APPLY[sign](left, right) >= 0:
            return left, right


def _solution(left: int, sign: str, right: int, result: int, final: int) -> str:
    return f"{left} {sign} {right} = {result}\n#### {final}"


def _digit(rng: random.Random) -> int:
    return _pick(rng, range(2, 10))


def _pick(rng: random.Random, choices: Sequence[T]) -> T:
    # Only random() is guaranteed to give the same numbers in every Python version; choice and shuffle are not.
    return choices[int(rng.random() * len(choices))]
