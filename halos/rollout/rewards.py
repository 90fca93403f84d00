"""Rewards computed from a completion's text. A user's own reward is a function like these, in a package of theirs.

`def reward(completion: str, row: Mapping[str, Any], *, ...) -> float | None`: `row` is the sample's record with its prompt, its
tokens and the row of the data; keyword-only parameters are keys next to `function`. None says that the function does not apply. A
sample for which it raises has no score, and is counted. halos/online/README.md has the other kinds, of all samples of a prompt
and async.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_WHOLLY_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")  # no nan, and no exponent: 1e999999 is text
_GROUPING = re.compile(r"(?<=[0-9])(?<!\b0),(?=(?:[0-9]{2,3},)*[0-9]{3}(?![0-9]))")  # of 1,000 and 1,00,000, not of 3,5 and 0,125


def exact_match(completion: str, row: Mapping[str, Any]) -> float:
    """1 where the final answer of the completion (`#### 12`, GSM8K's convention) equals the solution's, else 0.

    Two decimal numbers are equal by their values (`1,000`, `1000.` and `1000.0`), all else as text: `$5`, `5%` and `5 km` are not
    `5`, nor is `1e3` 1000. The accuracy of generated answers is its mean: `reward` of an online evaluation, and what
    launch/accuracy.py reports.
    """
    wanted = final_answer(solution_of(row)) or _plain(solution_of(row))
    answered = final_answer(completion)
    return float(answered is not None and _value(answered) == _value(wanted))


def final_answer(text: str) -> str | None:
    """The text after the last `####`, without commas of thousands or a final dot; None where there is none, or more lines."""
    _, mark, rest = text.rpartition("####")
    answer = _plain(rest)
    return answer if mark and answer and "\n" not in answer else None


def _plain(text: str) -> str:
    return _GROUPING.sub("", text.strip()).rstrip(".").rstrip()


def _value(answer: str) -> Decimal | str:
    return Decimal(answer) if _WHOLLY_NUMBER.fullmatch(answer) else answer


def last_number(completion: str, row: Mapping[str, Any]) -> float:
    """1 where the last number of the completion equals that of the solution, else 0: for models that follow no convention."""
    answered, wanted = ([text.replace(",", "") for text in _NUMBER.findall(part)] for part in (completion, solution_of(row)))
    return float(bool(answered) and bool(wanted) and Decimal(answered[-1]) == Decimal(wanted[-1]))


def maths(completion: str, row: Mapping[str, Any]) -> float:
    """1 where math-verify finds the completion's answer equal to the solution's, else 0."""
    from math_verify import parse, verify  # here: only this reward needs the package

    wanted = final_answer(solution_of(row)) or solution_of(row)
    return float(verify(parse(f"${wanted}$"), parse(final_answer(completion) or completion)))


def length(completion: str, row: Mapping[str, Any], *, target: int) -> float:
    """1 at `target` words, falling linearly to 0 with the distance from it."""
    return max(0.0, 1 - abs(len(completion.split()) - target) / target)


def overlong(completion: str, row: Mapping[str, Any], *, limit: int, buffer: int) -> float:
    """0 up to `limit` - `buffer` tokens, then linearly down to -1 at `limit`. Eq. 13 of arXiv:2503.14476."""
    tokens = int(row["tokens"])
    return -min(1.0, max(0.0, (tokens - (limit - buffer)) / buffer))


def ends(completion: str, row: Mapping[str, Any]) -> float:
    """1 where the model ended its answer, 0 where it was cut off at max_new_tokens."""
    return float(row.get("finish") == "stop")


def solution_of(row: Mapping[str, Any]) -> str:
    """The solution in the data. Raises KeyError where there is none."""
    if row.get("solution") is None:
        raise KeyError("the data has no solution: a column `solution` or `answer`, or a completion that is right")
    return str(row["solution"])
