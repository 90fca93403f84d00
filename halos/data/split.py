"""Selections of the rows of a source: `train`, `train[:200]`, `[:10%]`, and sums such as `train+validation[:10%]`."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from halos.data.row import Row
from halos.errors import UserError

_SPLIT = re.compile(r"(?P<name>[\w.-]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True, slots=True)
class Split:
    """One selection; an empty name is what a source gives where none is named."""

    name: str
    start: str | None = None
    stop: str | None = None

    @classmethod
    def of(cls, text: Any) -> "Split":
        """Raises UserError for text that is no selection."""
        match = _SPLIT.fullmatch(text) if isinstance(text, str) else None
        if not match:
            raise UserError(f"data entry: split={text!r} is not understood; write a name, a slice or both: train[:200], [:10%]")
        return cls(match["name"], match["start"], match["stop"])

    def select(self, read: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        """Yield the selected rows of those that `read` gives; they are read twice where their number must be known."""
        bounds = [bound for bound in (self.start, self.stop) if bound is not None]
        if all(bound.isdecimal() for bound in bounds):
            return islice(read(), *(int(bound) if bound else None for bound in (self.start, self.stop)))
        count = sum(1 for _ in read())
        start, stop, _ = slice(self._bound(self.start, count), self._bound(self.stop, count)).indices(count)
        return islice(read(), start, max(start, stop))

    @staticmethod
    def _bound(text: str | None, count: int) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)


def splits_of(text: Any) -> tuple[Split, ...]:
    """Return the selections whose rows a split gives, one after another. Raises UserError for text that is none."""
    if not isinstance(text, str) or "+" not in text:
        return (Split.of(text),)
    splits = tuple(Split.of(part.strip()) for part in text.split("+"))
    if len(set(splits)) < len(splits) or not all(split.name for split in splits):
        raise UserError(f"data entry: split={text!r} must be a sum of different, named splits: train+validation[:10%]")
    return splits


def default_splits(purpose: str) -> tuple[str, ...]:
    """Return the split names that serve as `train` or `eval` where an entry names none, the best first."""
    return ("eval", "validation", "valid", "val", "dev", "test") if purpose == "eval" else ("train",)
