"""Parse a row's columns into an example, and convert an example to the type that a loss takes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from halos.data.contradictions import (
    refuse_contradictions,
    refuse_unread_inputs,
    refuse_weights,
    says_something,
    unread_beside,
)
from halos.data.messages import has_null_arguments, is_learned, turns_of, with_settings, with_system
from halos.data.oddities import UNANSWERED
from halos.data.parts import check_completion, label_of, number_of, prompt_and_completion
from halos.data.records import RECORDS, refuse_other_logps, with_reward
from halos.data.row import Row
from halos.data.schemas.pairs import hh_turns
from halos.data.schemas.schema import ANSWERS, PROMPTS
from halos.data.schemas.table import Reading, asked_in, recognised
from halos.data.steps import COLUMNS as STEPWISE
from halos.data.steps import labels_of, stepwise
from halos.data.teacher import parse_columns
from halos.errors import UserError
from halos.examples import TEXT, Comparison, Demonstration, Example, Judgement, Scored, Stepwise, Turns

# the columns of each form of a row; those with a label or a reward add it
NEGATIVE_MARGIN = "with a negative margin, by which the rejected completion is better (data.filter='margin >= 0' leaves them out)"
PAIR, ANSWERED, TALK = ("prompt", "chosen", "rejected", "margin"), ("prompt", "completion"), ("messages",)
KNOWN = {*PROMPTS, *ANSWERS, *TALK, *PAIR, "text", "label", "reward", "conversations", "system", "input"}
NO_TEXT, NULL_ARGUMENTS = "whose text is empty", "with arguments of tool calls that are null, which are left out"
_EXPECTED = (
    "messages; prompt + completion; prompt + chosen + rejected; prompt + completion + label (or reward); prompt +"
    " completions + labels, of steps; or those of a schema in"
    " halos/data/README.md. data.columns={prompt: NAME} renames columns"
)


class Parsed(NamedTuple):
    """The example of a row, None where it is dropped, and why; and what was made of its columns, for the header."""

    example: Example | None
    notes: tuple[str, ...] = ()
    dropped: str = ""
    oddities: tuple[str, ...] = ()  # what the example no longer shows, by the names of data/oddities.py


def read_example(row: Row, *, score: str) -> Example:
    """`parse`, for rows that are not dropped."""
    parsed = parse(row, score=score)
    if parsed.example is None:
        raise UserError(f"{row.where}: a row {parsed.dropped} gives no example")
    return parsed.example


def parse(row: Row, *, score: str) -> Parsed:
    """Parse a row by its columns. `score` (last or all) selects the assistant turns of `messages` that are scored.

    A HALOs record is recognised by its column `type`. Raises UserError, naming the row, where it is no example, or where a column
    that would be learned from is lost.
    """
    if row.example is not None:
        return Parsed(_validated(row.example, row.where))
    reading = _reading(row)
    if reading.dropped:
        return Parsed(None, reading.notes, reading.dropped)
    if row.schemas and _is_empty_text(row.record, reading.columns):
        return Parsed(None, reading.notes, NO_TEXT)
    if has_null_arguments(reading.columns):
        reading = reading._replace(notes=(*reading.notes, NULL_ARGUMENTS))
    example, form = _read(reading.columns, row, score)
    refuse_weights(reading.columns, row.where)
    if form:
        refuse_contradictions(reading.columns, form, example, row.where)
    if isinstance(example, Demonstration) and (logps := parse_columns(reading.columns, row.where)) is not None:
        example = replace(example, teacher_logps=logps)
    is_unanswered = form == TALK and reading.columns["messages"][-1]["role"] != "assistant"
    unread = unread_beside(reading.columns["messages"], reading.columns) if form == TALK and row.schemas else ()
    negative = (NEGATIVE_MARGIN,) if form == PAIR and isinstance(example, Comparison) and (example.margin or 0) < 0 else ()
    return Parsed(example, (*reading.notes, *unread, *negative), oddities=(UNANSWERED,) if is_unanswered else ())


def _is_empty_text(record: Mapping[str, Any], columns: Mapping[str, Any]) -> bool:
    """Return whether a row is one of text, without any, and has nothing else that may be learned from."""
    given = record.get("text", "no such column")
    if given is not None and (not isinstance(given, str) or given.strip()):
        return False
    others = {name: value for name, value in columns.items() if name != "text"}
    return not any(says_something(value) or (name in KNOWN and value) for name, value in others.items())


def _read(columns: Mapping[str, Any], row: Row, score: str) -> tuple[Example, tuple[str, ...]]:
    """Return the example, and the columns of the form that it has; none for HALOs' records, whose `type` names the form."""
    if read := RECORDS.get(str(columns.get("type"))):
        return read(columns, row.where), ()
    if "chosen" in columns and "rejected" in columns:
        return _comparison(columns, row.where), PAIR
    if set(STEPWISE) <= columns.keys():
        return stepwise(columns, row.where), STEPWISE
    if {"prompt", "completion"} <= columns.keys():
        prompt, completion = prompt_and_completion(columns, "completion", row.where)
        if "label" in columns:
            return Judgement(prompt, completion, label_of(columns, (0, 1), row.where)), (*ANSWERED, "label")
        if "reward" in columns:
            return with_reward(columns, prompt, completion, row.where), (*ANSWERED, "reward")
        return Demonstration(prompt, completion), ANSWERED
    if "messages" in columns:
        turns = turns_of(columns["messages"], "user", "messages", row.where)
        return _conversation(turns, row.where, score), TALK
    if row.schemas and isinstance(text := columns.get("text"), str) and text.strip():
        return Demonstration((), ({"role": TEXT, "content": text},)), ("text",)
    if row.schemas and {*PROMPTS} & columns.keys() and (silent := [name for name in ANSWERS if columns.get(name) == ""]):
        raise UserError(f"{row.where}: {silent[0]} is empty: the assistant says nothing")
    given = row.original or row.record
    found = ", ".join(name for name, value in given.items() if value is not None) or "none"
    if empty := [name for name, value in given.items() if value is None]:
        found += f" (and null: {', '.join(empty)})"
    others = {name: name.lower() for name in given if name != name.lower() and name.lower() in KNOWN}
    hint = f"; names are in small letters: data.columns={{{', '.join(f'{new}: {old}' for old, new in others.items())}}}"
    raise UserError(f"{row.where}: columns found: {found}{hint if others else ''}; a row that can be trained on has {_EXPECTED}")


def read_prompt(row: Row) -> tuple[Turns, str | None]:
    """Return a row's prompt, and its answer if it has one: column `answer`, else `solution`, which may be worked; else the
    completion."""
    if row.example is not None:
        return row.example.prompt, _known_answer(row.example)
    given = {name: value for name, value in row.record.items() if value is not None}
    answer = next((str(given[name]) for name in ("answer", "solution") if name in given), None)
    is_known = not row.schemas or str(given.get("type")) in RECORDS
    if {*PROMPTS} & given.keys() and not {"completion", "chosen"} & given.keys() and not is_known:
        row = row._replace(record=asked_in(given, row.where), schemas=False)
    columns = _reading(row).columns
    asked = columns.get("prompt", columns.get("instruction"))
    if asked is not None and not {"completion", "chosen"} & columns.keys():
        refuse_unread_inputs(columns, row.where, schemas=not is_known, is_prompt=True)
        return turns_of(asked, "user", "prompt", row.where), answer
    example, form = _read(columns, row, "last")  # no contradictions are refused: nothing is learned from the row
    if not example.prompt:
        raise UserError(
            f"{row.where}: columns found: {', '.join(given)}; there is no prompt. data.columns={{prompt: NAME}} names it"
        )
    return example.prompt, answer or (None if form and columns.get("label") == 0 else _known_answer(example))


def _known_answer(example: Example) -> str | None:
    """Return the first completion, which is the best of several; None where its label is undesirable."""
    wrong = isinstance(example, Judgement) and not example.desirable
    return None if wrong else str(example.completions[0][-1].get("content") or "")


def _validated(example: Example, where: str) -> Example:
    """Check an example of a custom format. Raises UserError for turns or labels that would be refused in columns."""
    turns = {"prompt": turns_of(example.prompt, "user", "prompt", where)}
    for name, completion in zip(example.completed, example.completions, strict=True):
        parsed = turns_of(completion, "assistant", name, where)
        turns[name] = parsed if isinstance(example, Scored) and example.ids else check_completion(parsed, name, where)
    for name in example.labels:
        value = getattr(example, name)
        if not isinstance(value, bool):
            number_of({name: value}, name, where)
    if isinstance(example, Stepwise):
        labels_of([0 if label is None else label for label in example.step_labels], len(example.steps), where)
    if isinstance(example, Scored):
        refuse_other_logps(example.ids, example.logps, where)
    if example.sampled and len(example.sampled) != len(example.completed):
        raise UserError(f"{where}: sampled has the tokens of {len(example.sampled)} of {len(example.completed)} completions")
    return replace(example, **turns)


def _reading(row: Row) -> Reading:
    """Return the columns that are not null, of a known schema those of a built-in form. Raises UserError for one whose content
    would be lost."""
    columns = {name: value for name, value in row.record.items() if value is not None}
    is_record = str(columns.get("type")) in RECORDS
    if row.schemas and row.record.get("prompt", "") is None and isinstance(columns.get("chosen"), str):
        _refuse_null_prompt(columns, row.where)
    reading = recognised(columns, row.where) if row.schemas and not is_record else Reading(columns)
    columns = reading.columns
    if is_record:
        return reading
    refuse_unread_inputs(columns, row.where, schemas=row.schemas)
    return Reading(with_settings(with_system(columns, row.where), row.where), reading.notes, reading.dropped)


def _refuse_null_prompt(columns: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a pair of texts without the prompt that other rows have: how both begin need not be it."""
    if isinstance(columns.get("rejected"), str) and hh_turns(columns["chosen"]) is None:
        raise UserError(
            f"{where}: prompt is null, and chosen and rejected are text, which answers a prompt: data.filter='prompt is not None'"
            " leaves such rows out (the filter reads the names of the file)"
        )


def as_kind(example: Example, kind: type[Example], row: Row) -> list[Example]:
    """Convert `example` to what the loss takes: a pair to two labels or one demonstration, a desirable label to a demonstration,
    a label to a reward of 1 or -1.

    Empty where there is nothing to learn: an undesirable or empty completion makes no demonstration, and a pair of equal
    completions no preference. Raises UserError where rows of this form can never serve the loss.
    """
    converted = kind.of(example)
    if converted is not None:
        return list(converted)
    given = row.record if row.example is not None else row.original or row.record  # an example of the user's own has no columns
    columns = ", ".join(name for name, value in given.items() if value is not None)
    subject = f"columns found: {columns}. They" if columns else f"a {type(example).__name__}. Such rows"
    raise UserError(
        f"{row.where}: {subject} can train {example.trains or f'losses on {type(example).__name__}'}; the loss of this run learns"
        f" from {kind.columns or f'{kind.__name__}, which a function of data.format returns'}"
    )


# --- turns -------------------------------------------------------------------------------------------------------------


def _conversation(turns: Turns, where: str, score: str) -> Demonstration:
    learned = [n for n, turn in enumerate(turns) if is_learned(turn)]
    if not learned:
        weight = " of a weight other than 0" if any(turn["role"] == "assistant" for turn in turns) else ""
        raise UserError(f"{where}: messages has no assistant turn{weight}, so there is nothing to learn from")
    start, end = learned[0] if score == "all" else learned[-1], learned[-1] + 1  # later turns cannot change what is scored
    if start == 0:
        raise UserError(f"{where}: messages starts with the assistant: there is no turn to answer")
    return Demonstration(turns[:start], check_completion(turns[start:end], "messages", where))


def _comparison(columns: Mapping[str, Any], where: str) -> Comparison:
    margin = number_of(columns, "margin", where)
    chosen, rejected = (turns_of(columns[name], "assistant", name, where) for name in ("chosen", "rejected"))
    if "prompt" in columns and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt = turns_of(columns["prompt"], "user", "prompt", where)
        return Comparison(
            prompt, check_completion(chosen, "chosen", where), check_completion(rejected, "rejected", where), margin
        )
    if isinstance(columns["chosen"], str) or isinstance(columns["rejected"], str):
        raise UserError(f"{where}: chosen and rejected are text, so a column 'prompt' is needed too")
    shared = _num_shared_turns(chosen, rejected)
    for turns in (chosen, rejected):
        if not shared or turns[shared]["role"] != "assistant":
            raise UserError(f"{where}: chosen and rejected must share all turns up to the assistant turn where they differ")
    prompt = chosen[:shared]
    if "prompt" in columns and (own_prompt := turns_of(columns["prompt"], "user", "prompt", where)) != prompt[-len(own_prompt) :]:
        raise UserError(f"{where}: chosen and rejected repeat another prompt than that of the column 'prompt'")
    return Comparison(
        prompt,
        check_completion(chosen[shared:], "chosen", where),
        check_completion(rejected[shared:], "rejected", where),
        margin,
    )


def _num_shared_turns(chosen: Turns, rejected: Turns) -> int:
    """Count the first turns that two conversations share, at most all but the last of the shorter one."""
    most = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(most) if chosen[n] != rejected[n]), most)
