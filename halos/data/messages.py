"""Normalise the turns of a conversation: rows hold text or OpenAI-style messages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from halos.errors import UserError
from halos.examples import Message, Turns

ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM = ("system", "developer")
WEIGHT = "weight"  # of an assistant turn: 0 where it is not trained on
WEIGHT_NAMES = (WEIGHT, "train", "loss")  # in rows; `loss` as ms-swift and XTuner write it
REASONING, REASONING_NAMES = "reasoning_content", ("reasoning_content", "reasoning", "thinking")  # of a turn; the first is ours
SETTINGS = "chat_template_kwargs"  # of a conversation's first turn: what the template gets besides turns, `tools` among it
SETTING_COLUMNS = (SETTINGS, "tools", "functions")  # of a row, which give it
OURS = (WEIGHT, SETTINGS)  # keys of a turn that are none of the template's
TEXT_PARTS = ("text", "input_text", "output_text")  # types of parts of a turn's content
TURN_COLUMNS = ("prompt", "instruction", "messages", "chosen", "rejected", "completion")


def turns_of(value: Any, role: str, column: str, where: str) -> Turns:
    """Return text as one turn of `role`, and a list as its messages. Raises UserError, naming the row, for anything else."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if not (type(value) is list or isinstance(value, Sequence)) or not value:
        raise UserError(f"{where}: {column} must be text or a list of messages that is not empty")
    turns = tuple([_turn(each, column, where) for each in value])
    if any([SETTINGS in turn and (number > 0 or not isinstance(turn[SETTINGS], Mapping)) for number, turn in enumerate(turns)]):
        raise UserError(f"{where}: {column} has a turn with {SETTINGS}: they are a column of the row, an object")
    return turns


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


def with_settings(columns: dict[str, Any], where: str) -> dict[str, Any]:
    """Attach the columns `tools` and `chat_template_kwargs` to the first turn of the other columns. Raises UserError where they
    are of another shape."""
    settings = _settings(columns, where) if not columns.keys().isdisjoint(SETTING_COLUMNS) else {}
    if not settings:
        return columns
    begin = TURN_COLUMNS[:3] if {"prompt", "instruction"} & columns.keys() else TURN_COLUMNS
    turns = {name: _with_first(settings, columns[name], name, begins=name in begin) for name in TURN_COLUMNS if name in columns}
    return {**columns, **turns}


def moved_settings(turns: Turns, first: Message) -> Turns:
    """Return turns with the settings of the conversation that begins with `first`, which they may lack."""
    if SETTINGS not in first or not turns or SETTINGS in turns[0]:
        return turns
    return ({**turns[0], SETTINGS: first[SETTINGS]}, *turns[1:])


def _settings(columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    settings = _parsed(columns.get(SETTINGS), {}, where, SETTINGS)
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"{where}: {SETTINGS} is {type(settings).__name__}, not an object of names and values")
    tools = _parsed(columns.get("tools"), [], where, "tools") or _functions(columns.get("functions"))
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{where}: tools must be a list of objects, or JSON text of one")
    named = [_tool(_without_nulls(tool)) for tool in tools]
    return {**_without_nulls(settings), **({"tools": named} if named else {})}


def _functions(value: Any) -> list[Mapping[str, Any]]:
    """Return the functions that a row of OpenAI's older form describes; none for a column of another meaning."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    are_described = isinstance(value, list) and all(
        isinstance(each, Mapping) and "name" in each and not {"description", "parameters"}.isdisjoint(each) for each in value
    )
    return list(value) if are_described else []


def _parsed(value: Any, empty: Any, where: str, column: str) -> Any:
    if not isinstance(value, str):
        return empty if value is None else value
    try:
        return json.loads(value) if value.strip() else empty
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {column} is text that is no JSON: {str(error)[:200]}") from error


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tool as OpenAI describes one, where a row holds the function alone."""
    return {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool


def _with_first(settings: Mapping[str, Any], value: Any, column: str, *, begins: bool) -> Any:
    """Return a column's turns with `settings` at the first, where the conversation begins in this column."""
    if isinstance(value, str):
        return value if column not in TURN_COLUMNS[:2] else [{"role": "user", "content": value, SETTINGS: settings}]
    if not isinstance(value, Sequence) or not value or not isinstance(value[0], Mapping):
        return value  # invalid, which is reported where it is parsed
    return value if value[0].get("role") == "assistant" and not begins else [{**value[0], SETTINGS: settings}, *value[1:]]


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
    is_plain = type(turn) is dict and len(turn) == 2 and type(turn.get("content")) is str
    if is_plain and type(role := turn.get("role")) is str and role in ROLES:
        return dict(turn)
    if not isinstance(turn, Mapping) or "role" not in turn:
        actual = f"has {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else f"is {type(turn).__name__}"
        raise UserError(f"{where}: each turn of {column} needs role and content, one {actual}")
    turn = {name: value for name, value in turn.items() if value is not None and (name != "tool_calls" or value not in ([], ""))}
    turn = _with_tool_calls(turn, column, where)
    role = turn.get("role")
    if isinstance(role, str) and role.lower() in ROLES:
        role = turn["role"] = role.lower()
    if role not in ROLES:
        raise UserError(f"{where}: {column} has a turn of unknown role {role!r}; roles are {', '.join(ROLES)}")
    for name in ("content", *REASONING_NAMES):
        if isinstance(turn.get(name), Sequence) and not isinstance(turn[name], str):
            turn[name] = _joined(turn[name], f"{where}: {column} has a turn of role {role} whose {name}")
    content = turn.get("content")
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise UserError(f"{where}: {column} has a turn of role {role} whose content is {type(content).__name__}, not text")
    if "tool_calls" in turn:
        turn["tool_calls"] = _tool_calls(turn["tool_calls"], column, where)
    return _with_weight(_with_reasoning(turn, column, where), column, where)


def _with_tool_calls(turn: dict[str, Any], column: str, where: str) -> dict[str, Any]:
    """Return a turn of OpenAI's older form, with `function_call` or of role `function`, in the newer one. Raises UserError where
    it has both."""
    if turn.get("role") == "function":
        turn = {**turn, "role": "tool"}
    if not isinstance(call := turn.pop("function_call", None), Mapping):
        return turn
    if "tool_calls" in turn:
        raise UserError(f"{where}: {column} has a turn with tool_calls and function_call: leave one of them out")
    return {**turn, "tool_calls": [{"type": "function", "function": call}]}


def _joined(parts: Sequence[Any], what: str) -> str:
    """Join parts of text. Raises UserError for a part of another kind."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) and kind in TEXT_PARTS else part
        if not isinstance(text, str):
            why = "without text" if kind in TEXT_PARTS else "and only text can be trained on"
            raise UserError(f"{what} has a part of type {kind}, {why}")
        texts.append(text)
    return "".join(texts)


def _with_reasoning(turn: dict[str, Any], column: str, where: str) -> dict[str, Any]:
    """Give a turn's reasoning one name. Raises UserError where it has two that differ."""
    given = [turn.pop(name) for name in REASONING_NAMES if name in turn]
    if not given:
        return turn
    if not all(isinstance(each, str) for each in given) or len({each for each in given if each} or {""}) > 1:
        raise UserError(f"{where}: {column} has a turn with {', '.join(REASONING_NAMES)}: it takes one of them, as text")
    return {**turn, REASONING: max(given, key=len)}


def _with_weight(turn: dict[str, Any], column: str, where: str) -> Message:
    """Reduce its weight to 0 on assistant turns that are not trained on; other turns have none."""
    given = {name: turn.pop(name) for name in WEIGHT_NAMES if name in turn}
    for name, value in given.items():
        if value not in (0, 1):
            raise UserError(f"{where}: {column} has a turn whose {name} is {value!r}: 1 is trained on, and 0 is not")
    return turn if all(given.values()) or turn["role"] != "assistant" else {**turn, WEIGHT: 0}


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
            parsed = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    elif isinstance(arguments, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in arguments):  # a table's map
        arguments = dict(arguments)
    elif arguments is None or isinstance(arguments, Mapping):
        arguments = _without_nulls(arguments or {})
    return {**function, **({"arguments": arguments} if "arguments" in function else {})}


def has_null_arguments(columns: Mapping[str, Any]) -> bool:
    """Return whether a turn of a row calls a tool with null for an argument, which `turns_of` leaves out."""
    turns = [turn for value in columns.values() if isinstance(value, list) for turn in value
             if (type(turn) is dict or isinstance(turn, Mapping)) and isinstance(turn.get("tool_calls"), list)]  # fmt: skip
    calls = [call for turn in turns for call in turn["tool_calls"]]
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    arguments = [each.get("arguments") for each in functions if isinstance(each, Mapping)]
    return any(isinstance(each, Mapping) and _without_nulls(each) != each for each in arguments)


def _without_nulls(value: Any) -> Any:
    """Remove null keys: in a table every row has the columns of all others."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
