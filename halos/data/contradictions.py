"""Refuse a row of which a part that would be learned from is lost: it is read in one form, and has columns of another."""

from collections.abc import Mapping, Sequence
from typing import Any

from halos.errors import UserError
from halos.examples import Example

VERDICTS = ("label", "reward", "margin")  # numbers that some form learns from
ANSWERS = ("completion", "chosen", "rejected", "messages")
WEIGHTS = ("weight", "train")  # of a turn of messages; no form reads one of a row
INPUTS = ("input", "context", "history")  # what a prompt may be about; a known schema joins it
EMPTY = (None, "", "[]", [], {})
REMEDY = "leave it out or rename it, or make the example with a function of yours (data.format)"


def refuse_weights(columns: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a row that says it is not to be trained on, or not as much as others."""
    for name in WEIGHTS:
        value = columns.get(name, 1)
        if isinstance(value, int | float) and value != 1:
            raise UserError(
                f"{where}: the row has {name}={value}, which would be lost: a turn of messages may have a {name} of 0, an entry"
                f" of data.train a weight, and a row neither; {REMEDY}"
            )


def refuse_unread_inputs(columns: Mapping[str, Any], where: str, *, schemas: bool) -> None:
    """Raises UserError for a column that belongs to the prompt, and is neither joined to it nor in it."""
    asked = "instruction" if "prompt" not in columns else "prompt"
    is_answered = asked in columns and not {"completion", "chosen"}.isdisjoint(columns) and schemas
    for name in INPUTS:
        value = columns.get(name)
        belongs = {"history": True, "input": is_answered or (asked in columns and asked == "instruction"),
                   "context": is_answered and isinstance(value, str)}[name]  # fmt: skip
        if value in EMPTY or not belongs or (name != "history" and str(value).strip() in _words(columns[asked])):
            continue
        raise UserError(
            f"{where}: a column '{name}' is not read, and would be lost: put its content into {asked}, as text or turns, or leave"
            f" it out (data.columns={{{name}: null}})"
        )


def _words(value: Any) -> str:
    """Return the words of a prompt, text or turns."""
    turns = value if isinstance(value, Sequence) and not isinstance(value, str) else []
    return "\n".join(str(turn.get("content")) for turn in turns if isinstance(turn, Mapping)) if turns else str(value)


def refuse_contradictions(columns: Mapping[str, Any], form: Sequence[str], example: Example, where: str) -> None:
    """Raises UserError for a label, reward or margin that `form`, the columns that `example` is read from, does not have, and for
    a column with an answer that is none of its completions."""
    answers = {_text(completion) for completion in example.completions}
    for name in VERDICTS:
        if name in columns and name not in form:
            raise UserError(f"{_read_as(columns, form, where)}, so '{name}' would be lost: {REMEDY}")
    for name in ANSWERS:
        if name not in form and (answer := _answer(columns.get(name), name)) and answer not in answers:
            raise UserError(f"{_read_as(columns, form, where)}, so '{name}', which holds another answer, would be lost: {REMEDY}")


def _read_as(columns: Mapping[str, Any], form: Sequence[str], where: str) -> str:
    read = [name for name in form if name in columns]
    return f"{where}: columns found: {', '.join(columns)}. The row is read as {' + '.join(read)}"


def _answer(value: Any, column: str) -> str:
    """Return the last answer of a column; empty where it ends with none."""
    if isinstance(value, str):
        return "" if column == "messages" else value.strip()
    last = value[-1] if isinstance(value, Sequence) and value else None
    return _text(value) if isinstance(last, Mapping) and last.get("role") == "assistant" else ""


def _text(turns: Sequence[Mapping[str, Any]]) -> str:
    return str(turns[-1].get("content") or "").strip()
