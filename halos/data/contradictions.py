"""Refuse a row of which a part that would be learned from is lost: it is read in one form, and has columns of another."""

from collections.abc import Iterator, Mapping, Sequence
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
MIN_SENTENCE = 3  # words
EMPTY = (None, "", "[]", [], {})
REMEDY = "leave it out or rename it, or make the example with a function of yours (data.format)"


def refuse_weights(columns: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a row that says it is not to be trained on, or not as much as others."""
    for name in WEIGHTS:
        if name not in columns:
            continue
        value = columns[name]
        number = TRUTH.get(value.strip().lower(), number_in(value)) if isinstance(value, str) else value
        if isinstance(number, int | float) and number != 1:
            raise UserError(
                f"{where}: the row has {name}={value!r}, which would be lost: a turn of messages may have a {name} of 0, an entry"
                f" of data.train a weight, and a row neither; {REMEDY}"
            )


def refuse_unread_inputs(columns: Mapping[str, Any], where: str, *, schemas: bool, is_prompt: bool = False) -> None:
    """Raises UserError for a column that belongs to the prompt, and is neither joined to it nor in it. `is_prompt`: a model is to
    answer the row."""
    if columns.keys().isdisjoint(INPUTS):
        return
    asked = "instruction" if "prompt" not in columns else "prompt"
    is_answered = asked in columns and not {"completion", "chosen"}.isdisjoint(columns) and schemas
    about = is_answered or (is_prompt and asked in columns)
    belongs = {"history": True, "input": is_answered or (asked in columns and asked == "instruction"), "context": about,
               "choices": about}  # fmt: skip
    for name in INPUTS:
        value = columns.get(name)
        if value in EMPTY or not belongs[name]:
            continue
        places = (asked, *ANSWERS) if name == "choices" else (asked,)  # an interface's choices are the answers
        said = _plain(" ".join(_words(columns.get(each, "")) for each in places))
        if name == "history" or not all(part in said for part in _parts(name, value)):
            raise UserError(
                f"{where}: a column '{name}' is not read, and would be lost: put its content into {asked}, as text or turns, or"
                f" leave it out (data.columns={{{name}: null}})"
            )


def unread_beside(turns: Any, columns: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what is to be counted of the columns beside a whole conversation, `turns`: of those that may belong to it."""
    said = _plain(_words(turns))
    unread = [name for name in ("input", *ABOUT) if not all(part in said for part in _parts(name, columns.get(name)))]
    return tuple(f"with a column '{name}', which is not read beside messages" for name in unread)


def says_something(value: Any) -> bool:
    """Return whether a column holds words that may be learned from: several, or an object or list with any text."""
    if isinstance(value, Mapping | list):
        return any(_texts(value))
    return isinstance(value, str) and len(value.split()) > 1


def _parts(name: str, value: Any) -> list[str]:
    """Return the texts of a column that a prompt must have: a context's in a list or an object are sentences."""
    if name == "input" and not isinstance(value, str | None):
        return [_plain(str(value))]
    least = MIN_SENTENCE if name == "context" and not isinstance(value, str) else 1
    return [_plain(text) for text in _texts(value) if len(text.split()) >= least]


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value that is not blank."""
    if isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
    elif isinstance(value, str) and value.strip():
        yield value


def _plain(text: str) -> str:
    return " ".join(text.split())


def _words(value: Any) -> str:
    """Return the words of a prompt, text or turns."""
    turns = value if isinstance(value, Sequence) and not isinstance(value, str) else []
    return "\n".join(str(turn.get("content")) for turn in turns if isinstance(turn, Mapping)) if turns else str(value)


def refuse_contradictions(columns: Mapping[str, Any], form: Sequence[str], example: Example, where: str) -> None:
    """Raises UserError for a label, reward or margin that `form`, the columns that `example` is read from, does not have, and for
    a column with an answer that is none of its completions."""
    for name in VERDICTS:
        if name in columns and name not in form:
            raise UserError(f"{_read_as(columns, form, where)}, so '{name}' would be lost: {REMEDY}")
    others = [name for name in ANSWERS if name in columns and name not in form]
    answers = {_text(completion) for completion in example.completions} if others else ()
    for name in others:
        if (answer := _answer(columns[name], name)) and answer not in answers:
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
