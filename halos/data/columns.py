"""Rename and leave out columns of rows, and leave out rows by an expression of their columns."""

import re
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from halos.config.suggest import nearest
from halos.data.row import Row
from halos.data.row_filter import RowFilter
from halos.errors import UserError

LOOKED_AT = 1000  # first rows, of which one must have each column that is named: others may lack it


def with_columns(
    rows: Iterator[Row], columns: Mapping[str, str | None], filter: str | None, path: str, *, checked: bool = True
) -> Iterator[Row]:
    """Yield the rows for which `filter` holds, and others marked `left_out`; with `columns`, new name -> that of the file, or
    None to leave out the column. `filter` reads the names of the file.

    Raises UserError for a column that none of the first rows has, where that is `checked`.
    """
    if not columns and filter is None:
        yield from rows
        return
    head = list(islice(rows, LOOKED_AT if checked else 0))
    condition = RowFilter(filter) if filter is not None else None
    named = [(f"columns: {new}: {old}" if old else f"columns: {new}: null", old or new) for new, old in columns.items()]
    named += [(f"filter={filter!r}", name) for name in (condition.columns if condition else ())]
    _check(named, dict.fromkeys(name for row in head for name in row.record), path)
    for row in chain(head, rows):
        if condition is not None and not condition.holds(row.record, row.where):
            yield Row({}, row.where, left_out=True, end=row.end, note=f"filtered out by {filter}")
        else:
            yield row._replace(record=_renamed(row.record, columns), original=row.record) if columns else row


def _check(named: list[tuple[str, str]], known: Mapping[str, Any], path: str) -> None:
    for key, name in named:
        if known and name not in known:
            near = next((each for each in known if name in re.split(r"\W+", each)), None)  # filter='chosen-rating > 3' subtracts
            hint = f"column('{near}') in a filter is '{near}'; it has" if near and key.startswith("filter") else ""
            near = nearest(name, known)
            hint = hint or (f"did you mean '{near}'?" if near else "it has")
            raise UserError(f"data entry {path}: {key}: its rows have no column '{name}'; {hint} ({', '.join(known)})")


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """Return a row with its columns renamed, null where it lacks one; one that is renamed takes the place of another of that
    name."""
    moved = {old for old in columns.values() if old is not None}
    kept = {name: value for name, value in record.items() if name not in moved and name not in columns}
    return {**{new: record.get(old) for new, old in columns.items() if old is not None}, **kept}
