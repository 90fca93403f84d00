"""Normalise the turns of a conversation: rows hold text or OpenAI-style messages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from halos.errors import UserError
from halos.types import Message, Turns

ROLES = ("system", "developer", "user", "assistant", "tool")
WEIGHT = "weight"  # of an assistant turn: 0 where it is not trained on
TURN_COLUMNS = ("prompt", "instruction", "messages", "chosen", "rejected", "completion")


def turns_of(value: Any, role: str, column: str, where: str) -> Turns:
    """Return text as one turn of `role`, and a list as its messages. Raises UserError, naming the row, for anything else."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if not isinstance(value, Sequence) or not value:
        raise UserError(f"{where}: {column} must be text or a list of messages that is not empty")
    return tuple(_turn(each, column, where) for each in value)


def is_learned(turn: Message) -> bool:
    """Return whether a turn is the assistant's and trained on."""
    return turn["role"] == "assistant" and turn.get(WEIGHT) != 0


def with_system(columns: dict[str, Any], where: str) -> dict[str, Any]:
    """Insert a column `system` as the first turn of the other columns. Raises UserError where they have another system turn."""
    words = columns.get("system")
    if words in (None, "", []):
        return columns
    if not isinstance(words, str):
        raise UserError(f"{where}: system must be text, and is {type(words).__name__}")
    first = {"role": "system", "content": words}
    begin = TURN_COLUMNS[:3] if {"prompt", "instruction"} & columns.keys() else TURN_COLUMNS  # others may answer the prompt
    turns = {name: _after_system(first, columns[name], name, where, begins=name in begin)
             for name in TURN_COLUMNS if name in columns}  # fmt: skip
    return {**columns, **turns}


def _after_system(first: Message, value: Any, column: str, where: str, *, begins: bool) -> Any:
    """Return a column's turns after the system turn `first`, where the conversation begins in this column. A first turn of the
    assistant is an answer to another column's prompt, or where every conversation `begins` here a greeting."""
    if isinstance(value, str):
        return value if column not in TURN_COLUMNS[:2] else [first, {"role": "user", "content": value}]
    if not isinstance(value, Sequence) or not value or not isinstance(value[0], Mapping):
        return value  # invalid, which is reported where it is parsed
    if (value[0].get("role") == "assistant" and not begins) or value[0] == first:
        return value
    if value[0].get("role") == "system":
        raise UserError(f"{where}: a column 'system' and the system turn of {column} differ: leave one of them out")
    return [first, *value]


def _turn(turn: Any, column: str, where: str) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn:
        actual = f"has {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else f"is {type(turn).__name__}"
        raise UserError(f"{where}: each turn of {column} needs role and content, one {actual}")
    turn = {name: value for name, value in turn.items() if value is not None}
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise UserError(f"{where}: {column} has a turn of unknown role {role!r}; roles are {', '.join(ROLES)}")
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise UserError(f"{where}: {column} has a turn of role {role} whose content is {type(content).__name__}, not text")
    if "tool_calls" in turn:
        turn["tool_calls"] = _tool_calls(turn["tool_calls"], column, where)
    return _with_weight(turn, column, where)


def _with_weight(turn: dict[str, Any], column: str, where: str) -> Message:
    """Reduce `weight` and `train` to a weight of 0 on assistant turns that are not trained on; other turns have neither."""
    for name in (WEIGHT, "train"):
        if turn.get(name, 1) not in (0, 1):
            raise UserError(f"{where}: {column} has a turn whose {name} is {turn[name]!r}: 1 is trained on, and 0 is not")
    learned = turn.pop(WEIGHT, 1) and turn.pop("train", 1)
    return turn if learned or turn["role"] != "assistant" else {**turn, WEIGHT: 0}


def _tool_calls(calls: Any, column: str, where: str) -> list[Any]:
    """Return tool calls with their arguments parsed, where rows hold JSON text: templates print the object."""
    if not isinstance(calls, Sequence) or isinstance(calls, str) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{where}: tool_calls of {column} must be a list of objects")
    return [{**call, "function": _function(call["function"])} if isinstance(call.get("function"), Mapping) else _function(call)
            for call in calls]  # fmt: skip


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    elif isinstance(arguments, Mapping):
        arguments = _without_nulls(arguments)
    return {**function, **({"arguments": arguments} if "arguments" in function else {})}


def _without_nulls(value: Any) -> Any:
    """Remove null keys: in a table every row has the columns of all others."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
