"""Detect content of a row that a chat template silently leaves out of its rendering."""

import json
import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

from halos.data.messages import REASONING, SETTINGS, SYSTEM
from halos.errors import UserError
from halos.examples import Message, Turns

LEARNED, EARLIER = "a thought that is to be learned", "an earlier thought"
SENTINEL = "halos0sentinel"
_THINK_TAG = re.compile("<think>|</think>")
MERGE = ", or put it into the first user turn (data.system=merge)"
REMEDY = "give another model.chat_template, or remove it from the data"

Render = Callable[[Turns], str]


class Part(NamedTuple):
    """A part of a turn that a rendering should have."""

    number: int  # of the turn
    what: str
    words: str
    other: Message  # the turn with another such part
    needed: bool  # else it may be left out: a thought that nothing is learned from

    def refusal(self, where: str, remedy: str = "") -> UserError:
        shown = self.words if len(self.words) <= 60 else f"{self.words[:57]}..."
        more = MERGE if self.other["role"] in SYSTEM else ""
        return UserError(f"{where}: the chat template leaves out {self.what} ({shown!r}): {REMEDY}{more}{remedy}")


class OmissionCheck:
    """Finds what `render` leaves out, and remembers it by the shapes of conversations."""

    def __init__(self, render: Render) -> None:
        self._render, self._shapes = render, dict[Hashable, set[int]]()

    def missing(self, turns: Turns, text: str, *, learned: Collection[int] = ()) -> list[Part]:
        """Return the parts of `turns` that are missing from `text`, their rendering: the words of any turn, tools, tool calls and
        results, and reasoning. That of turns (by index) that are not `learned` from is left out on purpose by templates of
        reasoning models.

        A part is present if replacing it changes the rendering, since templates trim, escape and reformat. That is tried once
        per shape of conversation, and whenever the words are or are not literally in the text, unlike those of an earlier row.
        """
        parts = [Part(n, *part) for n, turn in enumerate(turns) for part in _parts(turn, learned=n in learned)]
        shape = (*map(_shape, turns), *((part.number, part.what) for part in parts))
        known, found = self._shapes.get(shape), set[int]()
        for index, part in enumerate(parts):
            there = part.words in text
            if known is not None and there != (index in known):  # as in an earlier row of this shape
                found |= set() if there else {index}
            elif not self._changes(text, (*turns[: part.number], part.other, *turns[part.number + 1 :])):
                found.add(index)
        if known is None:
            self._shapes[shape] = found
        return [parts[index] for index in sorted(found)]

    def _changes(self, text: str, others: Turns) -> bool:
        try:
            return self._render(others) != text
        except UserError:  # it refuses the replacement, so it reads that part
            return True


def _shape(turn: Message) -> Hashable:
    """Return what a template may test of a turn besides its words."""
    return turn["role"], *sorted(turn), len(turn.get("tool_calls") or ()), *sorted(turn.get(SETTINGS, ()))


def _parts(turn: Message, *, learned: bool) -> Iterator[tuple[str, str, Message, bool]]:
    """Yield each part of a turn: a description, its words, the turn with them replaced, and whether it is needed."""
    role, content = turn["role"], str(turn.get("content") or "")
    thought = LEARNED if learned else EARLIER
    for start, end, is_thought in _pieces(content) if role == "assistant" else [(0, len(content), False)]:
        if piece := content[start:end].strip():
            what = thought if is_thought else "a tool's result" if role == "tool" else f"words of the {role}"
            changed = content[:start] + content[start:end].replace(piece, SENTINEL, 1) + content[end:]
            yield what, piece, {**turn, "content": changed}, learned or not is_thought
    if role == "assistant" and turn.get(REASONING, "").strip():
        yield f"{thought}, {REASONING}", turn[REASONING].strip(), {**turn, REASONING: SENTINEL}, learned
    yield from ((*part, True) for part in _tool_call_parts(turn))
    if SETTINGS in turn and (tools := turn[SETTINGS].get("tools")):
        other = {"type": "function", "function": {"name": SENTINEL, "description": SENTINEL, "parameters": {}}}
        yield "the tools", json.dumps(tools, ensure_ascii=False), {**turn, SETTINGS: {**turn[SETTINGS], "tools": [other]}}, True


def _pieces(content: str) -> Iterator[tuple[int, int, bool]]:
    """Yield the start and end of what an assistant turn has before, between and after its tags of thoughts, and whether it is a
    thought: what stands before `</think>`."""
    start = 0
    for tag in _THINK_TAG.finditer(content):
        yield start, tag.start(), tag[0] == "</think>"
        start = tag.end()
    yield start, len(content), False


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
