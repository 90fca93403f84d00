"""Calls reward functions on the rows of samples, in the process of a worker; what they return and raise becomes outcomes."""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from halos.rollout.rows import DATA, OF_SAMPLE, Row
from halos.rollout.scorers._reward_functions import Part
from halos.rollout.types import Sample, text_of

Function = tuple[Part, Callable[[Any, Any], Any]]
SOLUTION = "solution"
RESERVED = (*OF_SAMPLE, SOLUTION, DATA)  # keys of a row that no column of the data stands under
LONGEST = 2000  # characters of a message about a function


@dataclass(frozen=True, slots=True)
class Outcome:
    """Values of one sample, one of each function that was called, None where a function does not apply; or why there are none."""

    values: tuple[float | None, ...] = ()
    problem: str = ""
    lacking: tuple[str, ...] = ()  # columns that a function read but the row does not have, where it raised


def row_of(sample: Sample) -> Row:
    """A sample's row as functions see it.

    Its own keys, with the answer as text under `solution`; under `data` the row of the data as it was, whose columns are also
    keys of their own unless they have the name of one of those.
    """
    prompt = sample.prompt
    data = {**{name: value for name, value in prompt.columns.items() if name != SOLUTION or not prompt.data}, **prompt.data}
    own = {name: value for name, value in sample.to_row().items() if name not in ("logps", DATA)}
    own.setdefault("output_ids", list(sample.ids))
    return {**{name: value for name, value in data.items() if name not in RESERVED}, **own, DATA: data}


class TrackedRow(dict[str, Any]):
    """A row that records which missing columns were read, those of the data as `data.NAME`. One that was read with a default is
    not missed."""

    def __init__(self, row: Mapping[str, Any], lacking: dict[str, None] | None = None, within: str = "") -> None:
        super().__init__(row)
        self.lacking: dict[str, None] = {} if lacking is None else lacking
        self._within = within
        if not within and isinstance(row.get(DATA), dict):
            self[DATA] = TrackedRow(row[DATA], self.lacking, f"{DATA}.")

    def __missing__(self, name: str) -> Any:
        self.lacking[f"{self._within}{name}"] = None
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        if default is None and super().get(name) is None:
            self.lacking[f"{self._within}{name}"] = None
        return super().get(name, default)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of samples for a worker, which unpacks them for every function: none sees what another did to them."""

    count: int
    packed: bytes

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Rows:
        return cls(len(samples), pickle.dumps([row_of(sample) for sample in samples]))

    def unpacked(self) -> list[TrackedRow]:
        return [TrackedRow(row) for row in pickle.loads(self.packed)]


def evaluate(functions: Sequence[Function], rows: Rows) -> list[Outcome]:
    """Call functions one after the other on one sample, or on all of a prompt. An exception costs the samples their score."""
    outcomes = _Outcomes(rows)
    for part, function in functions:
        arguments = outcomes.arguments(part)
        try:
            outcomes.add(part, function(*arguments))
        except Exception as error:  # an error in a user's function costs only its samples their score
            outcomes.fail(part, error, arguments[1])
    return outcomes.result()


async def evaluate_async(functions: Sequence[Function], rows: Rows) -> list[Outcome]:
    """The same with functions that are async, so that other samples go on where one waits."""
    outcomes = _Outcomes(rows)
    for part, function in functions:
        arguments = outcomes.arguments(part)
        try:
            returned = function(*arguments)
            outcomes.add(part, await returned if inspect.isawaitable(returned) else returned)
        except Exception as error:
            outcomes.fail(part, error, arguments[1])
    return outcomes.result()


class _Outcomes:
    """Collects what the functions return for each sample."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self._count = rows, rows.count
        self._values: list[list[float | None]] = [[] for _ in range(self._count)]
        self._problems = [""] * self._count
        self._lacking: tuple[str, ...] = ()

    def arguments(self, part: Part) -> tuple[Any, Any]:
        rows = self._rows.unpacked()
        texts = [text_of(row["output"]) for row in rows]
        return (texts, rows) if part.is_grouped else (texts[0], rows[0])

    def add(self, part: Part, returned: Any) -> None:
        if not part.is_grouped:
            return self._add_each(part, [returned])
        returned = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(returned, Sequence) or isinstance(returned, str):
            return self._fail_all(part, f"returned no list of rewards: {returned!r}")
        if len(returned) != self._count:
            return self._fail_all(part, f"returned {len(returned)} rewards for {self._count} completions")
        return self._add_each(part, returned)

    def fail(self, part: Part, error: Exception, rows: TrackedRow | Sequence[TrackedRow]) -> None:
        tracked = [rows] if isinstance(rows, TrackedRow) else rows
        self._lacking += tuple(name for row in tracked for name in row.lacking)
        self._fail_all(part, f"raised {type(error).__name__}: {_message(error)}")

    def result(self) -> list[Outcome]:
        lacking = tuple(dict.fromkeys(self._lacking))
        return [Outcome((), problem, lacking) if problem else Outcome(tuple(values))
                for values, problem in zip(self._values, self._problems, strict=True)]  # fmt: skip

    def _add_each(self, part: Part, returned: Sequence[Any]) -> None:
        for number, value in enumerate(returned):
            if value is None:
                self._values[number].append(None)
            elif isinstance(value, Real) and math.isfinite(value):
                self._values[number].append(float(value))
            else:
                self._fail(number, part, f"returned no finite number: {value!r}")

    def _fail_all(self, part: Part, problem: str) -> None:
        for number in range(self._count):
            self._fail(number, part, problem)

    def _fail(self, number: int, part: Part, problem: str) -> None:
        self._problems[number] = self._problems[number] or f"{part.path} {problem}"[:LONGEST]


def _message(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # of a user's own class
        return ""
