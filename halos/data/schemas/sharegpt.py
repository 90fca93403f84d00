"""ShareGPT: turns of {from, value}, in a column `conversations`, or in place of messages."""

import json
from collections.abc import Mapping
from typing import Any

from halos.data.messages import ROLES as OPENAI_ROLES
from halos.data.schemas.schema import Change, Columns, Schema, is_pair, without
from halos.errors import UserError

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "tool"),
    "system": "system", "function_call": "function_call", "tool_call": "function_call",
}  # fmt: skip
KNOWN = {*ROLES, *OPENAI_ROLES, "function"}
TALKS = ("conversations", "conversation")
TURNS = (*TALKS, "messages", "prompt", "chosen", "rejected", "completion")


def is_turn(value: Any) -> bool:
    """Return whether an object means to be a turn, OpenAI's or ShareGPT's: it has a known role, or says something."""
    if not isinstance(value, Mapping):
        return False
    roles = {str(value.get("role")).lower(), str(value.get("from")).lower()} & KNOWN
    return bool(roles) or {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()


def apply(columns: Columns, where: str) -> Change | None:
    """Turn {from, value} into {role, content}, and `conversations` into the prompt of a pair, or into messages."""
    changed = {name: _turns(columns[name], name, where) for name in TURNS
               if name in columns and _has_turns(columns[name], name)}  # fmt: skip
    talk = next((name for name in TALKS if name in changed), None)
    if talk is None and all(changed[name] == columns[name] for name in changed):
        return None
    found = {**columns, **changed}
    if talk is not None:
        target = "prompt" if is_pair(columns) else "messages"
        if found.get(target) not in (None, changed[talk]):
            raise UserError(
                f"{where}: columns '{talk}' and '{target}' hold different turns: data.columns={{{talk}: null}} leaves one out"
            )
        found = without(found, talk, **{target: changed[talk]})
    return Change(found, read_as="ShareGPT")


def _has_turns(value: Any, column: str) -> bool:
    """Return whether a column holds turns; a pair may have one turn that is in no list."""
    if isinstance(value, list):
        first = value[0] if value else None
        is_object = type(first) is dict or isinstance(first, Mapping)
        return is_object and ("from" in first or (column in TALKS and "role" in first))
    return column in ("chosen", "rejected") and isinstance(value, Mapping) and ("from" in value or "role" in value)


def _turns(value: Any, column: str, where: str) -> list[Any]:
    return [_turn(turn, column, where) for turn in ([value] if isinstance(value, Mapping) else value)]


def _turn(turn: Any, column: str, where: str) -> Any:
    if not isinstance(turn, Mapping) or turn.get("from") is None or turn.get("role") is not None:
        return turn
    role = ROLES.get(str(turn["from"]).strip().lower())
    if role is None:
        raise UserError(f"{where}: {column} has a turn from {turn['from']!r}; known are {', '.join(ROLES)}")
    rest = {name: part for name, part in turn.items() if name not in ("from", "value", "role")}
    if role == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": _calls(turn.get("value"), column, where), **rest}
    return {"role": role, "content": turn.get("value"), **rest}


def _calls(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    """Return the tool calls that the text of a turn holds: an object with a name and arguments, or a list of them."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        parsed = None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(f"{where}: {column} has a function_call that is no JSON object with a name: {str(value)[:60]!r}")
    return [{"type": "function", "function": dict(call)} for call in calls]


_HI, _HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
SCHEMA = Schema(
    "ShareGPT",
    "`conversations` (or `messages`, `prompt`, `chosen`, `rejected`) of `{from, value}`: human, gpt, system, function_call,"
    " observation and others",
    "`messages`; with `chosen` and `rejected` a pair",
    apply,
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], "id": "x"},
    {"messages": [_HI, _HELLO]},
)
