"""Rows by a function of the user's own: from a row as its file has it to an example, or to columns that are known here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from halos.config.custom_formats import load_format
from halos.config.plugins import code_hash
from halos.config.schema import Data
from halos.data.files import Row
from halos.errors import UserError
from halos.examples import Example

Converter = Callable[[dict[str, Any]], Any]


def entries_of(data: Data, purpose: str) -> list[Any]:
    """Of data.train or data.eval, each with data.format where it has no format of its own."""
    return [with_format(entry, data.format) for entry in getattr(data, purpose)]


def with_format(entry: Any, format: str | None) -> Any:
    if format is None or (isinstance(entry, Mapping) and entry.get("format") is not None):
        return entry
    return {**entry, "format": format} if isinstance(entry, Mapping) else {"path": entry, "format": format}


def code_hash_of(target: str) -> str:
    """Of the code that makes examples of rows."""
    load_format(target, "data.format", [target.partition(".")[0]])  # which the gate has admitted: imported, where it was not yet
    return code_hash(target) or ""


def convert_rows(target: str, rows: Iterator[Row]) -> Iterator[Row]:
    """`rows` as the function makes them: one, several, or one that says that it leaves a row out. Raises UserError, with the
    row's place, for whatever goes wrong in it."""
    function = load_format(target, "data.format", [target.partition(".")[0]])
    for row in rows:
        found = _call(function, target, row)
        several = isinstance(found, Sequence) and not isinstance(found, str)
        for number, one in enumerate(found if several else [found], 1):
            where = f"{row.where}.{number}" if several else row.where
            yield Row({}, where, left_out=True) if one is None else _row(one, where, target, row)
        if several and not found:
            yield Row({}, row.where, left_out=True)


def _call(function: Converter, target: str, row: Row) -> Any:
    try:
        return function(dict(row.record))
    except UserError as error:
        raise UserError(f"{row.where}: {target}: {error}") from error
    except Exception as error:  # whatever a function of the user's raises
        columns = ", ".join(row.record) or "none"
        raise UserError(f"{row.where}: {target} fails: {type(error).__name__}: {error}; columns found: {columns}") from error


def _row(given: Any, where: str, target: str, row: Row) -> Row:
    if isinstance(given, Example):
        return Row({}, where, example=given)
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        return Row(dict(given), where)
    raise UserError(
        f"{row.where}: {target} gives {type(given).__name__}: it must give a dict of columns such as prompt and completion, an"
        " example of halos.types, a list of them, or None for a row that is left out"
    )
