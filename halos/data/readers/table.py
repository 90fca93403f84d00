"""Read rows of csv and tsv files: the first line names the columns, and an empty field is null."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from halos.data.readers.streams import not_utf8, opened_text
from halos.data.row import Row
from halos.data.schemas.sharegpt import is_turn
from halos.errors import UserError, first_line_of

_OBJECTS = re.compile(r"\s*\[\s*\{")  # how JSON of a list of objects begins
_SEPARATOR = re.compile(r"sep=(.)\r?\n?")  # the first line of some files of Excel
TEXTS = ("text", "prompt", "instruction", "question", "query", "chosen", "rejected", "completion", "response", "answer", "output")


def read_csv(path: Path) -> Iterator[Row]:
    """Read fields separated by commas; by semicolons or tabs where the first line has these, and no comma."""
    return _read(path, ",;\t")


def read_tsv(path: Path) -> Iterator[Row]:
    return _read(path, "\t")


def _read(path: Path, delimiters: str) -> Iterator[Row]:
    """Read the rows, each named by the line on which it starts. Raises UserError for a row of other than the header's columns."""
    csv.field_size_limit(2**31 - 1)
    with opened_text(path) as file:
        lines, skipped = _lines(file, path), 0
        first = next(lines, "")
        if named := _SEPARATOR.fullmatch(first):
            first, skipped = next(lines, ""), 1
        delimiter = named[1] if named else next((each for each in delimiters if each in first), delimiters[0])
        spaced = f"{delimiter} " in first  # and so are the rows: a quote after a blank would be a part of the text
        reader = csv.reader(chain([first], lines), delimiter=delimiter, skipinitialspace=spaced, strict=True)
        names = list[str]()
        while True:
            where = f"{path}:{reader.line_num + 1 + skipped}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{where}: not a valid row: {first_line_of(error)}") from error
            if fields is None:
                return
            if not fields:
                continue
            if names:
                yield Row(_record(names, fields, where), where)
            names = names or _names(fields, where)


def _lines(file: Iterator[str], path: Path) -> Iterator[str]:
    number = 0
    while True:
        try:
            line = next(file, None)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].count(b"\n")  # the lines that were read with this one
            raise not_utf8(path, number + before + 1, error.object) from error
        if line is None:
            return
        number += 1
        yield line


def _names(fields: Sequence[str], where: str) -> list[str]:
    names = [name.strip() or f"column {number}" for number, name in enumerate(fields, 1)]  # pandas leaves that of its index empty
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{where}: two columns are named '{twice[0]}': the first line must name each column once")
    return names


def _record(names: Sequence[str], fields: Sequence[str], where: str) -> dict[str, Any]:
    if len(fields) != len(names):
        raise UserError(
            f"{where}: {len(fields)} fields, and the first line names {len(names)} columns ({', '.join(names)}): put text that"
            " has separators or line ends into double quotes"
        )
    return {name: _value(field, name, where) for name, field in zip(names, fields, strict=True)}


def _value(field: str, name: str, where: str) -> Any:
    """Return a field: text; null where it is empty; and a list of objects where it is the JSON text of one, of turns in a column
    that is text in other files."""
    if not _OBJECTS.match(field):
        return field or None
    try:
        value = json.loads(field)
    except (ValueError, RecursionError):
        if "'role'" in field or "'from'" in field:
            raise UserError(f"{where}: {name} is a list of messages as Python prints it: write it as JSON") from None
        return field
    are_objects = all(isinstance(each, dict) for each in value)
    return value if are_objects and (name not in TEXTS or any(map(is_turn, value))) else field
