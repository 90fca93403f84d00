"""Schema: how the rows of one schema are recognised and turned into the columns of a built-in form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Columns = Mapping[str, Any]  # of a row, without those that are null
PROMPTS = ("prompt", "instruction", "question", "query")
ANSWERS = ("completion", "response", "answer", "output")


class Change(NamedTuple):
    """The columns that a schema makes of a row's; `note` is what was done, for the header, or `read_as` what the whole row is
    read as, and `dropped` why nothing can be."""

    columns: dict[str, Any]
    note: str = ""
    dropped: str = ""
    read_as: str = ""


@dataclass(frozen=True, slots=True)
class Schema:
    """One schema. The manual's table is written from it; a test reads `row`, and `same`, which gives the same example."""

    name: str
    columns: str  # that its rows have
    read_as: str  # what they become
    apply: Callable[[Columns, str], Change | None]  # from columns and a row's position; None for rows of other schemas
    row: Columns
    same: Columns
    needs: frozenset[str] = frozenset()  # columns of which a row has at least one; it is not tried on others


def without(columns: Columns, *names: str, **new: Any) -> dict[str, Any]:
    """Return columns without some, and with others."""
    return {**{name: value for name, value in columns.items() if name not in names}, **new}


def is_pair(columns: Columns) -> bool:
    return {"chosen", "rejected"} <= columns.keys()
