"""Parts of a row: prompts and completions, numbers and labels, each checked where it is read."""

from collections.abc import Mapping
from typing import Any

from halos.data.messages import is_learned, turns_of
from halos.data.numbers import ClassNumber, number_in
from halos.errors import UserError
from halos.examples import Turns


def check_completion(turns: Turns, column: str, where: str) -> Turns:
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


def prompt_and_completion(columns: Mapping[str, Any], column: str, where: str) -> tuple[Turns, Turns]:
    """Return `prompt` and one completion, whose column may repeat the turns of the prompt first."""
    prompt = turns_of(columns.get("prompt", columns.get("instruction")), "user", "prompt", where)
    completion = turns_of(columns[column], "assistant", column, where)
    if completion[: len(prompt)] == prompt:
        completion = completion[len(prompt) :] or completion
    return prompt, check_completion(completion, column, where)


def number_of(columns: Mapping[str, Any], column: str, where: str) -> float | None:
    """Return the number in a column, None where there is none. Raises UserError for anything else."""
    value = columns.get(column)
    if value is None:
        return None
    if (found := number_in(value)) is None:
        raise UserError(f"{where}: {column} is {value!r}, not a number")
    return found


def label_of(columns: Mapping[str, Any], allowed: tuple[int, ...], where: str) -> bool:
    """Return whether a row's label says that it is desirable. Raises UserError for one that is not `allowed`."""
    value = columns.get("label")
    if isinstance(value, ClassNumber):
        return value.is_desirable
    if not isinstance(value, int | float) or value not in allowed:
        raise UserError(f"{where}: label is {value!r}; it must be true or false, or one of {', '.join(map(str, allowed))}")
    return value > 0
