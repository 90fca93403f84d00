"""Numbers and verdicts in columns: as numbers, or as text, which is all that a csv file has."""

import math
import re
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def number_in(value: Any) -> float | None:
    """Return a finite number, or that which text is; None for anything else."""
    if isinstance(value, str):
        value = float(value) if _NUMBER.fullmatch(value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):  # of a table's decimal column
        return None
    try:
        number = float(value)
    except OverflowError:  # an int beyond the largest float
        return None
    return number if math.isfinite(number) else None


def exact(value: Any) -> int | float | None:
    """Return what `number_in` does, a whole number with all of its digits."""
    number = number_in(value)
    if number is None or isinstance(value, float | Decimal):
        return number
    return int(value) if isinstance(value, int) or re.fullmatch(r"\s*[+-]?\d+\s*", value) else number


class ClassNumber(int):
    """The number of a class in a table of `datasets` whose name is a verdict: 0 may be `chosen`, the first of the names."""

    is_desirable: bool

    @classmethod
    def of(cls, number: int, name: str) -> "ClassNumber":
        new = cls(number)
        new.is_desirable = bool(verdict_in(name))
        return new


# words for a completion that is to be learned from, and for one that is not; blanks, hyphens, underscores and case do not matter
DESIRABLE = ("good", "true", "yes", "desirable", "chosen", "positive", "correct", "accepted", "thumbs up", "up", "👍", "1")
UNDESIRABLE = (
    "bad", "false", "no", "undesirable", "rejected", "negative", "incorrect", "wrong", "thumbs down", "down", "👎", "0", "-1",
)  # fmt: skip


def verdict_in(value: Any) -> bool | None:
    """Return whether a label says that a completion is desirable: true, 1 or a word for it; None for anything unknown."""
    if isinstance(value, ClassNumber):
        return value.is_desirable
    if isinstance(value, str):
        words = re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", value.strip().lower())
        words = re.sub(r"(?<=[01])\.0*$", "", words)  # as a table of floats writes 1
        return True if words in DESIRABLE else False if words in UNDESIRABLE else None
    return bool(value > 0) if isinstance(value, int | float) and value in (-1, 0, 1) else None
