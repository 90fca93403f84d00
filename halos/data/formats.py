"""Parse a row's columns into an example, and convert an example to the type that a loss takes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

from halos.data.contradictions import refuse_contradictions, refuse_weights
from halos.data.messages import is_learned, turns_of, with_settings, with_system
from halos.data.row import Row
from halos.errors import UserError
from halos.examples import Comparison, Demonstration, Example, Judgement, SampledTokens, Scored, Turns, says_something

# the columns of each form of a row; those with a label or a reward add it
PAIR, ANSWERED, TALK = ("prompt", "chosen", "rejected", "margin"), ("prompt", "completion"), ("messages",)
CUT = "length"  # `finish` of a sample that was cut at max_new_tokens
_EXPECTED = "messages; prompt + completion; prompt + chosen + rejected; or prompt + completion + label (or reward)"


def read_example(row: Row, *, score: str) -> Example:
    """Parse a row by its columns. `score` (last or all) selects the assistant turns of `messages` that are scored.

    A HALOs record is recognised by its column `type`. Raises UserError, naming the row, where it is no example, or where a column
    that would be learned from is lost.
    """
    if row.example is not None:
        return _validated(row.example, row.where)
    columns = _columns(row)
    example, form = _read(columns, row, score)
    refuse_weights(columns, row.where)
    if form:
        refuse_contradictions(columns, form, example, row.where)
    return example


def _read(columns: Mapping[str, Any], row: Row, score: str) -> tuple[Example, tuple[str, ...]]:
    """Return the example, and the columns of the form that it has; none for HALOs' records, whose `type` names the form."""
    if read := _HALOS.get(str(columns.get("type"))):
        return read(columns, row.where), ()
    if {"chosen", "rejected"} <= columns.keys():
        return _comparison(columns, row.where), PAIR
    if {"prompt", "completion"} <= columns.keys():
        prompt, completion = _prompt_and_completion(columns, "completion", row.where)
        if "label" in columns:
            return Judgement(prompt, completion, _label(columns, (0, 1), row.where)), (*ANSWERED, "label")
        if "reward" in columns:
            return _with_reward(columns, prompt, completion, row.where), (*ANSWERED, "reward")
        return Demonstration(prompt, completion), ANSWERED
    if "messages" in columns:
        turns = turns_of(columns["messages"], "user", "messages", row.where)
        return _conversation(turns, row.where, score), TALK
    empty = [name for name in row.record if name not in columns]
    named = (", ".join(columns) or "none") + (f" (and null: {', '.join(empty)})" if empty else "")
    raise UserError(f"{row.where}: columns found: {named}; a row that can be trained on has {_EXPECTED}")


def read_prompt(row: Row) -> tuple[Turns, str | None]:
    """Return a row's prompt, and its answer if it has one: column `solution` or `answer`, else the completion."""
    if row.example is not None:
        return row.example.prompt, _known_answer(row.example)
    columns = _columns(row)
    answer = next((str(columns[name]) for name in ("solution", "answer") if name in columns), None)
    asked = columns.get("prompt", columns.get("instruction"))
    if asked is not None and not {"completion", "chosen"} & columns.keys():
        return turns_of(asked, "user", "prompt", row.where), answer
    example, form = _read(columns, row, "last")  # no contradictions are refused: nothing is learned from the row
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
        turns[name] = parsed if isinstance(example, Scored) and example.ids else _check_completion(parsed, name, where)
    for name in example.labels:
        value = getattr(example, name)
        if not isinstance(value, bool):
            _number({name: value}, name, where)
    if isinstance(example, Scored):
        _refuse_other_logps(example.ids, example.logps, where)
    if example.sampled and len(example.sampled) != len(example.completed):
        raise UserError(f"{where}: sampled has the tokens of {len(example.sampled)} of {len(example.completed)} completions")
    return replace(example, **turns)


def _columns(row: Row) -> dict[str, Any]:
    """Return the columns that are not null. Raises UserError for one whose content would be lost."""
    columns = {name: value for name, value in row.record.items() if value is not None}
    is_record = str(columns.get("type")) in _HALOS
    empty = (None, "", "[]", [], {})
    asked = "instruction" if "prompt" not in columns else "prompt"
    for name in ("input", "history") if asked == "instruction" and asked in columns else ("history",):
        if columns.get(name) not in empty and not is_record:
            raise UserError(
                f"{row.where}: a column '{name}' is not read, and would be lost: put its content into {asked}, as text or turns"
            )
    return columns if is_record else with_settings(with_system(columns, row.where), row.where)


def as_kind(example: Example, kind: type[Example], row: Row) -> list[Example]:
    """Convert `example` to what the loss takes: a pair to two labels or one demonstration, a desirable label to a demonstration,
    a label to a reward of 1 or -1.

    Empty where there is nothing to learn: an undesirable or empty completion makes no demonstration, and a pair of equal
    completions no preference. Raises UserError where rows of this form can never serve the loss.
    """
    converted = kind.of(example)
    if converted is not None:
        return list(converted)
    columns = ", ".join(name for name, value in row.record.items() if value is not None)
    subject = f"columns found: {columns}. They" if columns else f"a {type(example).__name__}. Such rows"
    raise UserError(
        f"{row.where}: {subject} can train {example.trains or f'losses on {type(example).__name__}'}; the loss of this run learns"
        f" from {kind.columns or f'{kind.__name__}, which a function of data.format returns'}"
    )


# --- turns -------------------------------------------------------------------------------------------------------------


def _check_completion(turns: Turns, column: str, where: str) -> Turns:
    """Check that a completion starts and ends with the assistant, and that no assistant turn is empty."""
    for turn in (turns[0], turns[-1]):
        if turn["role"] != "assistant":
            raise UserError(f"{where}: {column} must start and end with an assistant turn, not with one of role {turn['role']}")
        if not is_learned(turn):
            raise UserError(f"{where}: {column} starts or ends with a turn of weight 0, so there is nothing to learn from")
    for turn in turns:
        if turn["role"] == "assistant" and not turn.get("tool_calls") and not turn["content"].strip():
            raise UserError(f"{where}: {column} is empty: the assistant says nothing")
    return turns


def _prompt_and_completion(columns: Mapping[str, Any], column: str, where: str) -> tuple[Turns, Turns]:
    """Return `prompt` and one completion, whose column may repeat the turns of the prompt first."""
    prompt = turns_of(columns.get("prompt", columns.get("instruction")), "user", "prompt", where)
    completion = turns_of(columns[column], "assistant", column, where)
    if completion[: len(prompt)] == prompt:
        completion = completion[len(prompt) :] or completion
    return prompt, _check_completion(completion, column, where)


def _conversation(turns: Turns, where: str, score: str) -> Demonstration:
    learned = [n for n, turn in enumerate(turns) if is_learned(turn)]
    if not learned:
        weight = " of a weight other than 0" if any(turn["role"] == "assistant" for turn in turns) else ""
        raise UserError(f"{where}: messages has no assistant turn{weight}, so there is nothing to learn from")
    start, end = learned[0] if score == "all" else learned[-1], learned[-1] + 1  # later turns cannot change what is scored
    if start == 0:
        raise UserError(f"{where}: messages starts with the assistant: there is no turn to answer")
    return Demonstration(turns[:start], _check_completion(turns[start:end], "messages", where))


# --- pairs and labels --------------------------------------------------------------------------------------------------


def _comparison(columns: Mapping[str, Any], where: str) -> Comparison:
    margin = _number(columns, "margin", where)
    chosen, rejected = (turns_of(columns[name], "assistant", name, where) for name in ("chosen", "rejected"))
    if "prompt" in columns and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt = turns_of(columns["prompt"], "user", "prompt", where)
        return Comparison(
            prompt, _check_completion(chosen, "chosen", where), _check_completion(rejected, "rejected", where), margin
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
        _check_completion(chosen[shared:], "chosen", where),
        _check_completion(rejected[shared:], "rejected", where),
        margin,
    )


def _num_shared_turns(chosen: Turns, rejected: Turns) -> int:
    """Count the first turns that two conversations share, at most all but the last of the shorter one."""
    most = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(most) if chosen[n] != rejected[n]), most)


def _number(columns: Mapping[str, Any], column: str, where: str) -> float | None:
    value = columns.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {column} is {value!r}, not a number")
    return float(value)


def _label(columns: Mapping[str, Any], allowed: tuple[int, ...], where: str) -> bool:
    value = columns.get("label")
    if not isinstance(value, int | float) or value not in allowed:
        raise UserError(f"{where}: label is {value!r}; it must be true or false, or one of {', '.join(map(str, allowed))}")
    return value > 0


# --- records of HALOs (its label.py and sample.py write them) ------------------------------------------------------------


def _pairwise(columns: Mapping[str, Any], where: str) -> Comparison:
    """Parse a pair: label 1 prefers output_A, as HALOs itself reads it; the difference of the rewards is the margin."""
    _require(columns, ("prompt", "output_A", "output_B", "label"), where)
    first = _label(columns, (0, 1), where)
    rewards = _number(columns, "reward_A", where), _number(columns, "reward_B", where)
    margin = None
    if rewards[0] is not None and rewards[1] is not None:
        margin = rewards[0] - rewards[1] if first else rewards[1] - rewards[0]
    names = ("output_A", "output_B") if first else ("output_B", "output_A")
    (prompt, chosen), (_, rejected) = (_prompt_and_completion(columns, name, where) for name in names)
    return Comparison(prompt, chosen, rejected, margin, sampled=_sampled_tokens(columns, names, where))


def _binary(columns: Mapping[str, Any], where: str) -> Judgement:
    _require(columns, ("prompt", "output", "label"), where)
    prompt, completion = _prompt_and_completion(columns, "output", where)
    return Judgement(prompt, completion, _label(columns, (0, 1, -1), where),
                     sampled=_sampled_tokens(columns, ("output",), where))  # fmt: skip


def _scalar(columns: Mapping[str, Any], where: str) -> Scored:
    _require(columns, ("prompt", "output", "reward"), where)
    return _with_reward(columns, *_sampled(columns, where), where)


def _sampled(columns: Mapping[str, Any], where: str) -> tuple[Turns, Turns]:
    """Return a prompt and the completion sampled for it, which may be empty: a model may end at once."""
    prompt = turns_of(columns["prompt"], "user", "prompt", where)
    return prompt, turns_of(columns["output"], "assistant", "output", where)


def _with_reward(columns: Mapping[str, Any], prompt: Turns, completion: Turns, where: str) -> Scored:
    """Return a completion with its reward, and its sampled tokens where the row has them (output_ids, logps, vocabulary)."""
    reward = _number(columns, "reward", where)
    assert reward is not None, "the column is there"
    tokens, logps = _tokens(columns, where), columns.get("logps") or ()
    _refuse_other_logps(tokens.ids, logps, where)
    if (masked := columns.get("masked", False)) not in (0, 1):
        raise UserError(f"{where}: masked is {masked!r}; it takes true or false: whether nothing is learned from the completion")
    if not tokens.ids and not says_something(completion):
        raise UserError(f"{where}: output is empty, and there are no output_ids to tell what was sampled")
    return Scored(prompt, completion, reward, tokens.ids, tuple(map(float, logps)), tokens.vocabulary, cut=tokens.cut,
                  masked=bool(masked))  # fmt: skip


def _sampled_tokens(columns: Mapping[str, Any], outputs: Sequence[str], where: str) -> tuple[SampledTokens, ...]:
    """Return the tokens of completions in the columns `outputs`; empty where the row says nothing of any."""
    tokens = tuple(_tokens(columns, where, of=name.removeprefix("output")) for name in outputs)
    return tokens if any(each != SampledTokens() for each in tokens) else ()


def _tokens(columns: Mapping[str, Any], where: str, *, of: str = "") -> SampledTokens:
    """Parse a completion's tokens, from columns whose names end in `of`. Raises UserError where they are no token ids."""
    ids = columns.get(f"output_ids{of}")
    if ids is not None and not (isinstance(ids, Sequence) and all(type(each) is int and each >= 0 for each in ids)):
        raise UserError(f"{where}: output_ids{of} is {str(ids)[:60]}, not a list of token ids")
    return SampledTokens(tuple(ids or ()), columns.get(f"vocabulary{of}"), columns.get(f"finish{of}") == CUT)


def _refuse_other_logps(ids: Sequence[Any], logps: Any, where: str) -> None:
    """Raises UserError for log-probs that are not one number for each of the sampled tokens."""
    if not isinstance(logps, Sequence) or not all(isinstance(each, float | Real) and math.isfinite(each) for each in logps):
        raise UserError(f"{where}: logps is {str(logps)[:60]}, not a list of finite numbers")
    if logps and len(logps) != len(ids):
        raise UserError(f"{where}: logps has {len(logps)} numbers for {len(ids)} output_ids")


def _sample(columns: Mapping[str, Any], where: str) -> Demonstration:
    _require(columns, ("output",), where)
    sampled = _sampled_tokens(columns, ("output",), where)
    return Demonstration(*_prompt_and_completion(columns, "output", where), sampled=sampled)


def _require(columns: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    if missing := [name for name in names if name not in columns]:
        raise UserError(f"{where}: a {columns['type']} record has {', '.join(names)}; this one lacks {', '.join(missing)}")


_HALOS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "pairwise_feedback": _pairwise,
    "binary_feedback": _binary,
    "scalar_feedback": _scalar,
    "sample": _sample,
}
