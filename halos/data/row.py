"""Row: the columns of one row of data, and its position, so that messages can name it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from halos.errors import UserError
from halos.examples import Example

EQUAL = "with equal completions"  # why a pair is dropped
LEFT_OUT = "left out by data.format"
HELD_OUT = "held out for evaluation"  # begins the notes of rows of training data that are
UNKNOWN_OFFSET = -1


class End(NamedTuple):
    """Where the line of a row ends: a reader that goes on there skips what is before it."""

    file: int  # of the files of its entry, counted from 0
    offset: int  # bytes; UNKNOWN_OFFSET where the file has changed since: lines are counted
    line: int


class Row(NamedTuple):
    """One row of data and its position, `train.jsonl:12`."""

    record: dict[str, Any]
    where: str
    left_out: bool = False  # by a custom format, a filter, or an adapter
    example: Example | None = None  # of a custom format, instead of columns
    original: dict[str, Any] | None = None  # the row as it was read, where `record` was made of it
    note: str = ""  # why the row is left out, where it is not a custom format that says so; of others, what is counted of it
    schemas: bool = True  # whether other columns than those of the built-in forms are recognised
    end: End | None = None  # of a stream's lines of JSON; rows that are made of one row share it


def row_of(value: Any, where: str) -> Row:
    """Raises UserError for a value that has no columns."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row is an object with named columns, this is {type_name(value)}")
    return Row(value, where)


def type_name(value: Any) -> str:
    names = {"list": "a list", "str": "text", "int": "a number", "float": "a number", "bool": "true or false", "NoneType": "null"}
    return names.get(type(value).__name__, type(value).__name__)


@contextmanager
def depth_limited(where: str) -> Iterator[None]:
    """Raises UserError, naming the row, where what is read inside is nested too deeply."""
    try:
        yield
    except RecursionError as error:
        raise UserError(f"{where}: its columns are nested too deeply to be read") from error
