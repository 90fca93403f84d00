"""What a row says and its rendering does not: a template that leaves out a turn is silent about it."""

import json
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Any

from halos.errors import UserError
from halos.types import Message, Turns

SENTINEL = "halos0sentinel"
THOUGHT = ("<think>", "</think>")
REASONS = ("reasoning_content", "reasoning", "thinking")  # keys that hold a turn's thought
REMEDY = "give another model.chat_template, or take that out of the data"

Render = Callable[[Turns], str]


class OmissionCheck:
    """Knows which shapes of conversations a template, `render`, leaves nothing out of."""

    def __init__(self, render: Render) -> None:
        self._render, self._shapes = render, set[Hashable]()

    def refuse(self, turns: Turns, text: str, where: str, *, learned: Collection[int] = ()) -> None:
        """Raises UserError where something of `turns` left no trace in `text`, their rendering: words of any turn, tool calls
        and results, and the thoughts of turns that are `learned` from (by their numbers). Thoughts of earlier turns are what
        templates of reasoning models leave out on purpose.

        Another word in its place must change the rendering: templates trim, escape and reformat. That is tried once for each
        shape of conversation, and wherever the words themselves do not stand in the text.
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
        except UserError:  # it reads what it refuses
            return True


def _shape(turn: Message) -> Hashable:
    """What a template may ask of a turn besides its words."""
    return turn["role"], *sorted(turn), len(turn.get("tool_calls") or ())


def _parts(turn: Message, *, learned: bool) -> Iterator[tuple[str, str, Message]]:
    """Each part of a turn: what it is, its words, and the turn with another word in their place."""
    role, content = turn["role"], str(turn.get("content") or "")
    thought, words = _split(content) if role == "assistant" else ("", content)
    of = "a tool's result" if role == "tool" else f"words of the {role}"
    if words.strip():
        yield of, words.strip(), {**turn, "content": content.replace(words, SENTINEL)}
    if learned and thought.strip():
        yield "a thought that is to be learned", thought.strip(), {**turn, "content": content.replace(thought, SENTINEL, 1)}
    for key in REASONS if learned else ():
        if isinstance(turn.get(key), str) and turn[key].strip():
            yield f"a thought that is to be learned, {key}", turn[key].strip(), {**turn, key: SENTINEL}
    yield from _tool_call_parts(turn)


def _split(content: str) -> tuple[str, str]:
    """Thought and words of an assistant turn."""
    before, mark, words = content.rpartition(THOUGHT[1])
    return (before.rpartition(THOUGHT[0])[2], words) if mark else ("", content)


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
