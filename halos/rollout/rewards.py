"""Rewards that are computed from a completion's text. A user's own is a function like these, in a package of theirs.

`def reward(completion: str, row: Mapping[str, Any], *, ...) -> float`: `row` is the sample's record with its prompt and, where
the data names one, its `solution`; keyword-only parameters are keys beside `function`. What it raises costs that sample its
score, and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_FINAL = re.compile(r"####\s*(\S.*?)\s*\Z")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_match(completion: str, row: Mapping[str, Any]) -> float:
    """1 where the answer that ends the completion (`#### 12`, GSM8K's convention) is the solution's, else 0."""
    wanted = final_answer(solution_of(row)) or solution_of(row).strip()
    return float(final_answer(completion) == wanted)


def final_answer(text: str) -> str | None:
    """What stands after the last `####`, a number without its commas; None where nothing does."""
    found = _FINAL.search(text)
    return found[1].replace(",", "").rstrip(".") if found else None


def last_number(completion: str, row: Mapping[str, Any]) -> float:
    """1 where the last number of the completion is that of the solution, else 0: for models that know no convention."""
    said, wanted = ([text.replace(",", "") for text in _NUMBER.findall(part)] for part in (completion, solution_of(row)))
    return float(bool(said) and bool(wanted) and float(said[-1]) == float(wanted[-1]))


def maths(completion: str, row: Mapping[str, Any]) -> float:
    """1 where math-verify finds the completion's answer equal to the solution's, else 0."""
    from math_verify import parse, verify  # here: only this reward needs the package

    wanted = final_answer(solution_of(row)) or solution_of(row)
    return float(verify(parse(f"${wanted}$"), parse(final_answer(completion) or completion)))


def length(completion: str, row: Mapping[str, Any], *, target: int) -> float:
    """1 at `target` words, and less the further away, down to 0."""
    return max(0.0, 1 - abs(len(completion.split()) - target) / target)


def overlong(completion: str, row: Mapping[str, Any], *, limit: int, buffer: int) -> float:
    """0 up to `limit` - `buffer` tokens, then on a line down to -1 at `limit`. Eq. 13 of arXiv:2503.14476."""
    tokens = int(row["tokens"])
    return -min(1.0, max(0.0, (tokens - (limit - buffer)) / buffer))


def ends(completion: str, row: Mapping[str, Any]) -> float:
    """1 where the model has ended its answer, 0 where it was cut at max_new_tokens."""
    return float(row.get("finish") == "stop")


def solution_of(row: Mapping[str, Any]) -> str:
    """Raises KeyError where the data names no solution."""
    if row.get("solution") is None:
        raise KeyError("the data has no solution: a column `solution` or `answer`, or a completion that is right")
    return str(row["solution"])
