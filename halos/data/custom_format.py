"""Custom formats: a user function turns a row of a file into an example, or into columns of a built-in format."""

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
    """Return the entries of data.train or data.eval, with data.format where an entry has no format."""
    return [with_format(entry, data.format) for entry in getattr(data, purpose)]


def with_format(entry: Any, format: str | None) -> Any:
    if format is None or (isinstance(entry, Mapping) and entry.get("format") is not None):
        return entry
    return {**entry, "format": format} if isinstance(entry, Mapping) else {"path": entry, "format": format}


def code_hash_of(target: str) -> str:
    """Return the hash of a custom format's code."""
    load_format(target, "data.format", [target.partition(".")[0]])  # imports it; its package was validated with the config
    return code_hash(target) or ""


def convert_rows(target: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Convert `rows` by the function: each to one row, to several, or to one marked `left_out`. Raises UserError, naming the row,
    for any error of the function."""
    function = load_format(target, "data.format", [target.partition(".")[0]])
    for row in rows:
        result = _call(function, target, row)
        several = isinstance(result, Sequence) and not isinstance(result, str)
        for number, example in enumerate(result if several else [result], 1):
            where = f"{row.where}.{number}" if several else row.where
            yield Row({}, where, left_out=True) if example is None else _row(example, where, target, row)
        if several and not result:
            yield Row({}, row.where, left_out=True)


def _call(function: Converter, target: str, row: Row) -> Any:
    try:
        return function(dict(row.record))
    except UserError as error:
        raise UserError(f"{row.where}: {target}: {error}") from error
    except Exception as error:  # user code may raise anything
        columns = ", ".join(row.record) or "none"
        raise UserError(f"{row.where}: {target} fails: {type(error).__name__}: {error}; columns found: {columns}") from error


def _row(result: Any, where: str, target: str, row: Row) -> Row:
    if isinstance(result, Example):
        return Row({}, where, example=result, original=row.record)
    if isinstance(result, Mapping) and all(isinstance(name, str) for name in result):
        return Row(dict(result), where, original=row.record)
    raise UserError(
        f"{row.where}: {target} returns {type(result).__name__}: it must return a dict of columns such as prompt and completion,"
        " an example of halos.types, a list of them, or None for a row that is left out"
    )
