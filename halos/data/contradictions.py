"""Refuse a row of which a part that would be learned from is lost: it is read in one form, and has columns of another."""

from collections.abc import Mapping, Sequence
from typing import Any

from halos.data.numbers import number_in
from halos.errors import UserError
from halos.examples import Example

VERDICTS = ("label", "kto_tag", "reward", "margin")  # that some form learns from
ANSWERS = ("completion", "chosen", "rejected", "messages")
WEIGHTS = ("weight", "train")  # of a turn of messages; no form reads one of a row
INPUTS = ("input", "context", "choices", "history")  # what a prompt may be about; a known schema joins some
TRUTH = {"true": 1, "false": 0}  # in files whose fields are text
ABOUT = ("context", "choices")
EMPTY = (None, "", "[]", [], {})
REMEDY = "leave it out or rename it, or make the example with a function of yours (data.format)"


def refuse_weights(columns: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a row that says it is not to be trained on, or not as much as others."""
    for name in WEIGHTS:
        value = columns.get(name, 1)
        number = TRUTH.get(value.strip().lower(), number_in(value)) if isinstance(value, str) else value
        if isinstance(number, int | float) and number != 1:
            raise UserError(
                f"{where}: the row has {name}={value!r}, which would be lost: a turn of messages may have a {name} of 0, an entry"
                f" of data.train a weight, and a row neither; {REMEDY}"
            )


def refuse_unread_inputs(columns: Mapping[str, Any], where: str, *, schemas: bool, is_prompt: bool = False) -> None:
    """Raises UserError for a column that belongs to the prompt, and is neither joined to it nor in it. `is_prompt`: a model is to
    answer the row."""
    asked = "instruction" if "prompt" not in columns else "prompt"
    is_answered = asked in columns and not {"completion", "chosen"}.isdisjoint(columns) and schemas
    about = is_answered or (is_prompt and asked in columns)
    belongs = {"history": True, "input": is_answered or (asked in columns and asked == "instruction"), "context": about,
               "choices": about}  # fmt: skip
    for name in INPUTS:
        value = columns.get(name)
        if value in EMPTY or not belongs[name] or (name in ABOUT and not _says_something(value)):
            continue
        if name == "history" or str(value).strip() not in _words(columns[asked]):
            raise UserError(
                f"{where}: a column '{name}' is not read, and would be lost: put its content into {asked}, as text or turns, or"
                f" leave it out (data.columns={{{name}: null}})"
            )


def unread_beside(turns: Any, columns: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what is to be counted of the columns beside a whole conversation, `turns`: of those that may belong to it."""
    words = _words(turns)
    unread = [
        name for name in ("input", *ABOUT) if _says_something(columns.get(name)) and str(columns[name]).strip() not in words
    ]
    return tuple(f"with a column '{name}', which is not read beside messages" for name in unread)


def _says_something(value: Any) -> bool:
    """Return whether there are words in a column: text, or in an object or a list a text of several."""
    if isinstance(value, Mapping | list):
        parts = value.values() if isinstance(value, Mapping) else value
        return any(_says_something(part) and (not isinstance(part, str) or " " in part.strip()) for part in parts)
    return isinstance(value, str) and bool(value.strip())


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
