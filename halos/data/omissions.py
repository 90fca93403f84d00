"""Detect content of a row that a chat template silently leaves out of its rendering."""

import json
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Any

from halos.data.messages import REASONING, SETTINGS
from halos.errors import UserError
from halos.types import Message, Turns

SENTINEL = "halos0sentinel"
THINK_TAGS = ("<think>", "</think>")
REMEDY = "give another model.chat_template, or remove it from the data"

Render = Callable[[Turns], str]


class OmissionCheck:
    """Checks that `render` leaves nothing out, and remembers the shapes of conversations for which it does not."""

    def __init__(self, render: Render) -> None:
        self._render, self._shapes = render, set[Hashable]()

    def refuse(self, turns: Turns, text: str, where: str, *, learned: Collection[int] = ()) -> None:
        """Raises UserError where a part of `turns` is missing from `text`, their rendering: the words of any turn, tool calls and
        results, and the reasoning of the turns (by index) that are `learned` from. Templates of reasoning models leave out
        the reasoning of earlier turns on purpose.

        A part is present if replacing it changes the rendering, since templates trim, escape and reformat. That is tried once
        per shape of conversation, and whenever the words do not occur literally in the text.
        """
        parts = [(number, *part) for number, turn in enumerate(turns) for part in _parts(turn, learned=number in learned)]
        shape = (*map(_shape, turns), *((number, what) for number, what, _, _ in parts))
        is_new = shape not in self._shapes
        for number, what, words, other in parts:
            if (is_new or words not in text) and not self._changes(text, (*turns[:number], other, *turns[number + 1 :])):
                shown = words if len(words) <= 60 else f"{words[:57]}..."
                raise UserError(f"{where}: the chat template leaves out {what} ({shown!r}): {REMEDY}")
        self._shapes.add(shape)

    def _changes(self, text: str, others: Turns) -> bool:
        try:
            return self._render(others) != text
        except UserError:  # it refuses the replacement, so it reads that part
            return True


def _shape(turn: Message) -> Hashable:
    """Return what a template may test of a turn besides its words."""
    return turn["role"], *sorted(turn), len(turn.get("tool_calls") or ()), *sorted(turn.get(SETTINGS, ()))


def _parts(turn: Message, *, learned: bool) -> Iterator[tuple[str, str, Message]]:
    """Yield each part of a turn: a description, its words, and the turn with them replaced."""
    role, content = turn["role"], str(turn.get("content") or "")
    reasoning, words = _split(content) if role == "assistant" else ("", content)
    what = "a tool's result" if role == "tool" else f"words of the {role}"
    if words.strip():
        yield what, words.strip(), {**turn, "content": content.replace(words, SENTINEL)}
    if learned and reasoning.strip():
        yield "a thought that is to be learned", reasoning.strip(), {**turn, "content": content.replace(reasoning, SENTINEL, 1)}
    if learned and turn.get(REASONING, "").strip():
        yield f"a thought that is to be learned, {REASONING}", turn[REASONING].strip(), {**turn, REASONING: SENTINEL}
    yield from _tool_call_parts(turn)
    if SETTINGS in turn and (tools := turn[SETTINGS].get("tools")):
        other = {"type": "function", "function": {"name": SENTINEL, "description": SENTINEL, "parameters": {}}}
        yield "the tools", json.dumps(tools, ensure_ascii=False), {**turn, SETTINGS: {**turn[SETTINGS], "tools": [other]}}


def _split(content: str) -> tuple[str, str]:
    """Split the content of an assistant turn into reasoning and words."""
    before, mark, words = content.rpartition(THINK_TAGS[1])
    return (before.rpartition(THINK_TAGS[0])[2], words) if mark else ("", content)


def _tool_call_parts(turn: Message) -> Iterator[tuple[str, str, Message]]:
    calls: list[Mapping[str, Any]] = list(turn.get("tool_calls") or [])
    for number, call in enumerate(calls):
        function = call.get("function")
        inner = function if isinstance(function, Mapping) else call
        for key in ("name", "arguments"):
            value = inner.get(key)
            if value in (None, "", {}):
                continue
            changed = {**inner, key: SENTINEL if isinstance(value, str) else {SENTINEL: SENTINEL}}
            other = {**call, "function": changed} if inner is function else changed
            words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"the {key} of a tool call", words, {**turn, "tool_calls": [*calls[:number], other, *calls[number + 1 :]]}
