"""Functions of the user's: a reader, from a path to rows, and a format, from a row to an example or columns of a known form."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos.config.custom_formats import load_format, load_reader
from halos.config.plugins import code_hash
from halos.config.schema import Data
from halos.config.signature import import_target
from halos.data.row import Row
from halos.errors import UserError
from halos.examples import Example

Converter = Callable[[dict[str, Any]], Any]


def entries_of(data: Data, purpose: str) -> list[Any]:
    """Return the entries of data.train or data.eval, with data.format and other keys where an entry has none of its own."""
    common = {"format": data.format, "reader": data.reader, "columns": data.columns, "filter": data.filter}
    given = {name: value for name, value in common.items() if value} | ({} if data.schemas else {"schemas": False})
    given |= {"stream": True} if data.stream is True and purpose == "train" else {}
    return [with_common(entry, given) for entry in getattr(data, purpose)]


def with_common(entry: Any, common: Mapping[str, Any]) -> Any:
    if not common:
        return entry
    own = entry if isinstance(entry, Mapping) else {"path": entry}
    return {**own, **{name: value for name, value in common.items() if own.get(name) is None}}


def code_hash_of(target: str) -> str:
    """Return the hash of the code of a reader or a format."""
    import_target(target, "data", [target.partition(".")[0]], example="mypackage.rows")  # it was validated with the config
    return code_hash(target) or ""


def own_rows(target: str, path: Path) -> Iterator[Row]:
    """Read a path by the reader `target`. Raises UserError, naming the row, for any error of it, and for what is no row."""
    function = load_reader(target, "data.reader", [target.partition(".")[0]])
    number = 0
    try:
        for number, record in enumerate(function(path), 1):
            if not isinstance(record, Mapping):
                raise UserError(f"it yields {type(record).__name__}: a row must be a dict of its columns")
            if unnamed := [name for name in record if not isinstance(name, str)]:
                raise UserError(f"it yields a row with a column {unnamed[0]!r}: names of columns must be text")
            yield Row(dict(record), f"{path}:{number}")
            number += 1
    except UserError as error:
        raise UserError(f"{path}:{max(number, 1)}: {target}: {error}") from error
    except Exception as error:  # user code may raise anything
        raise UserError(f"{path}:{max(number, 1)}: {target} fails: {type(error).__name__}: {error}") from error


def convert_rows(target: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Convert `rows` by the function, but those that are left out before: each to one row, to several, or to one marked
    `left_out`. Raises UserError, naming the row, for any error of the function."""
    function = load_format(target, "data.format", [target.partition(".")[0]])
    for row in rows:
        if row.left_out:
            yield row
            continue
        result = _call(function, target, row)
        several = isinstance(result, Sequence) and not isinstance(result, str)
        for number, example in enumerate(result if several else [result], 1):
            where = f"{row.where}.{number}" if several else row.where
            yield Row({}, where, left_out=True, end=row.end) if example is None else _row(example, where, target, row)
        if several and not result:
            yield Row({}, row.where, left_out=True, end=row.end)


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
        return Row({}, where, example=result, original=row.record, end=row.end)
    if isinstance(result, Mapping) and all(isinstance(name, str) for name in result):
        return Row(dict(result), where, original=row.record, end=row.end)
    raise UserError(
        f"{row.where}: {target} returns {type(result).__name__}: it must return a dict of columns such as prompt and completion,"
        " an example of halos.types, a list of them, or None for a row that is left out"
    )
