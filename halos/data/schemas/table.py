"""The table of schemas, in the order in which they are tried: several may apply to one row, such as ShareGPT and scores."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from halos.data.schemas.answered import ALPACA, ANSWERED, ORCA
from halos.data.schemas.json_turns import SCHEMA as JSON_TURNS
from halos.data.schemas.labels import LABELS, TALKS, TEXT
from halos.data.schemas.pairs import HH, IMPLICIT, MARGINS, ULTRAFEEDBACK, hh_turns
from halos.data.schemas.schema import PROMPTS, Schema
from halos.data.schemas.sharegpt import SCHEMA as SHAREGPT

SCHEMAS: tuple[Schema, ...] = (
    JSON_TURNS,
    ORCA,
    SHAREGPT,
    ULTRAFEEDBACK,
    TEXT,
    ALPACA,
    ANSWERED,
    HH,
    IMPLICIT,
    MARGINS,
    TALKS,
    LABELS,
)


class Reading(NamedTuple):
    """The columns of a built-in form, what was made of the row, and why it is dropped, if it is."""

    columns: dict[str, Any]
    notes: tuple[str, ...] = ()
    dropped: str = ""


def recognised(columns: Mapping[str, Any], where: str) -> Reading:
    """Apply every schema to the columns of a row, without those that are null; the first that reads the whole row gives its
    name to the reading. Raises UserError, naming the row, for columns that could be read in several ways."""
    found, notes, is_read = dict(columns), list[str](), False
    for schema in SCHEMAS:
        change = schema.apply(found, where) if not schema.needs or not schema.needs.isdisjoint(found) else None
        if change is None:
            continue
        if change.dropped:
            return Reading(found, tuple(notes), change.dropped)
        found = change.columns
        notes += [change.note] if change.note else []
        notes += [f"read as {change.read_as}"] if change.read_as and not is_read else []
        is_read |= bool(change.read_as)
    return Reading(found, tuple(notes))


def asked_in(columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the columns of a row that is only asked, with its question as `prompt`; what could answer it does not matter."""
    found = dict(columns)
    for schema in (JSON_TURNS, ORCA, SHAREGPT, ALPACA):
        change = schema.apply(found, where)
        found = found if change is None else change.columns
    asked = next(name for name in PROMPTS if name in found)
    found = {**found, "prompt": found[asked]}
    turns = hh_turns(found["prompt"]) if isinstance(found["prompt"], str) else None
    return found if turns is None else {**found, "prompt": turns}


def manual() -> str:
    """Return the table of the manual."""
    lines = ["| schema | columns | read as |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {each.name} | {each.columns} | {each.read_as} |" for each in SCHEMAS)])
