"""The keys of a sample's row in a file, and the columns of the data, which no such key can be taken for."""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from halos.errors import UserError

Row = dict[str, Any]  # a line of a file
DATA = "data"  # the key under which a prompt's row of the data stands in prompts, samples and what reward functions get

# keys of a sample and of its score in a row
OF_SAMPLE = ("type", "prompt_id", "sample_id", "prompt", "split", "output", "finish", "tokens", "seed", "temperature",
             "generator", "output_ids", "logps", "vocabulary", "generator_sha256")  # fmt: skip
OF_SCORE = ("reward", "labeller", "cost", "problem", "parts", "normalised", "verdict")
# the types that keys of a sample may have in files of other tools, where they are not null, and how messages call them
_Types = Mapping[str, tuple[tuple[type, ...], str]]
_TYPES: _Types = {
    **dict.fromkeys(("split", "finish", "generator", "vocabulary", "generator_sha256"), ((str,), "text")),
    **dict.fromkeys(("sample_id", "tokens", "seed"), ((int,), "a whole number")),
    "temperature": ((int, float), "a number"),
}
_LISTS: _Types = {"output_ids": ((int,), "a list of whole numbers"), "logps": ((int, float), "a list of numbers")}


def check_types(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a value of another type than its key takes. A sample without an id would join another's group."""
    if type(row["prompt_id"]) not in (str, int, float):
        raise UserError(f"{where}: prompt_id is {_shown(row['prompt_id'])}, not text or a number, by which samples are grouped")
    for name, (types, words) in _TYPES.items():
        if row.get(name) is not None and type(row[name]) not in types:
            raise UserError(f"{where}: {name} is {_shown(row[name])}, not {words}")
    for name, (types, words) in _LISTS.items():
        values = row.get(name)
        if values is not None and not (isinstance(values, list) and all(type(value) in types for value in values)):
            raise UserError(f"{where}: {name} is {_shown(values)}, not {words}")


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)[:60]


def as_json(value: Any) -> Any:
    """A value of the data with the types that JSON has, so that live loops and files hold the same.

    Dates, times and decimals become text (ISO 8601), bytes base64 text, tuples and sets lists, arrays nested lists, nan null, and
    an infinity the text that `float` reads; anything else becomes its `str`.
    """
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None if math.isnan(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(name): as_json(each) for name, each in value.items()}
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if isinstance(value, set | frozenset):
        return [as_json(each) for each in sorted(value, key=repr)]  # whose own order differs between processes
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(each) for each in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if callable(to_list := getattr(value, "tolist", None)):  # numpy and torch
        return as_json(to_list())
    return str(value)
