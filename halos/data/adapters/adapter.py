"""Adapter: from the rows of a data set, read as often as it needs them, to rows of a built-in form."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from halos.data.row import Row
from halos.errors import UserError

Read = Callable[[], Iterator[Row]]
Adapter = Callable[[Read, str], Iterator[Row]]  # from the rows and their purpose, train or eval
Convert = Callable[[Mapping[str, Any]], dict[str, Any] | str]  # to columns, or to the reason why a row is left out


def row_by_row(name: str, convert: Convert) -> Adapter:
    """Return an adapter that converts each row on its own. Raises UserError for a row that is none of the data set's."""

    def rows(read: Read, purpose: str) -> Iterator[Row]:
        return (converted(row, name, convert) for row in read())

    return rows


def converted(row: Row, name: str, convert: Convert) -> Row:
    if row.left_out:
        return row
    try:
        result = convert(row.record)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        columns = ", ".join(row.record)
        raise UserError(f"{row.where}: no row of {name}: {type(error).__name__} {error}; columns found: {columns}") from error
    if isinstance(result, str):
        return Row({}, row.where, left_out=True, note=result)
    return Row(result, row.where, original=row.record)
