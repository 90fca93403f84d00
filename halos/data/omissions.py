"""Detect content of a row that a chat template silently leaves out of its rendering."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

from halos.data.messages import REASONING, SETTINGS, SYSTEM
from halos.errors import UserError
from halos.examples import Message, Turns

LEARNED, EARLIER = "a thought that is to be learned", "an earlier thought"
SENTINEL = "halos0sentinel"
MOST_SHAPES = 10_000  # that are remembered
FEW_TURNS = 16  # of words alone: the shapes of conversations with no more are looked up in a few steps
_MARK = re.compile(rf"{SENTINEL}(\d+)z")  # of a part, by its index
_TOOL = {"type": "function", "function": {"name": SENTINEL, "description": SENTINEL, "parameters": {}}}
_THINK_TAG = re.compile("<think>|</think>")
MERGE = ", or put it into the first user turn (data.system=merge)"
REMEDY = "give another model.chat_template, or remove it from the data"

Render = Callable[[Turns], str]
Put = Callable[[Message, Any], Message]  # a turn, with another value in the place of a part


class Part(NamedTuple):
    """A part of a turn that a rendering should have."""

    index: int  # among those of the conversation
    number: int  # of the turn
    role: str
    what: str
    value: Any  # text; arguments of a tool call as an object; or tools
    put: Put
    needed: bool  # else it may be left out: a thought that nothing is learned from

    @property
    def words(self) -> str:
        return self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)

    @property
    def other(self) -> Any:
        """Another value of its type."""
        return SENTINEL if isinstance(self.value, str) else {SENTINEL: SENTINEL} if isinstance(self.value, Mapping) else [_TOOL]

    def marked(self) -> tuple[Any, str]:
        """Return the value with a mark of its own for the text or an object's first name, and what the mark stands for. Other
        values of an object keep their types, which templates print in different ways; tools have no mark."""
        mark = f"{SENTINEL}{self.index}z"
        if isinstance(self.value, str):
            return mark, self.value
        if isinstance(self.value, Mapping):
            (first, value), *others = self.value.items()
            return {mark: value, **dict(others)}, str(first)
        return self.value, ""

    def refusal(self, where: str, remedy: str = "") -> UserError:
        shown = self.words if len(self.words) <= 60 else f"{self.words[:57]}..."
        more = MERGE if self.role in SYSTEM else ""
        return UserError(f"{where}: the chat template leaves out {self.what} ({shown!r}): {REMEDY}{more}{remedy}")


class OmissionCheck:
    """Finds what `render` leaves out, and remembers it by the shapes of conversations."""

    def __init__(self, render: Render) -> None:
        self._render, self._shapes = render, dict[bytes, set[int]]()

    def missing(self, turns: Turns, text: str, *, learned: Collection[int] = ()) -> list[Part]:
        """Return the parts of `turns` that are missing from `text`, their rendering: the words of any turn, tools, tool calls and
        results, and reasoning. That of turns (by index) that are not `learned` from is left out on purpose by templates of
        reasoning models.

        A part is present if replacing it changes the rendering, since templates trim, escape and reformat. That is tried once
        per shape of conversation, and whenever the words are or are not literally in the text, unlike those of an earlier row.
        """
        if (plain := _plain_shape(turns)) is not None:
            known = self._shapes.get(_digest_of_plain(plain))
            if known is not None and not known and all([turn["content"].strip() in text for turn in turns]):
                return []  # as of the earlier row of this shape
        parts = _all_parts(turns, learned)
        shape = _digest(turns, parts)
        known, tried, lost = self._shapes.get(shape), list[Part](), set[int]()
        for part in parts:
            there = part.words in text
            if known is None or there == (part.index in known):
                tried.append(part)
            elif not there:  # as in an earlier row of this shape
                lost.add(part.index)
        lost |= {part.index for part in self._lost(turns, text, tried)}
        if known is None:
            self._shapes[shape] = lost
            if len(self._shapes) > MOST_SHAPES:
                del self._shapes[next(iter(self._shapes))]
        return [part for part in parts if part.index in lost]

    def _lost(self, turns: Turns, text: str, parts: Sequence[Part]) -> Sequence[Part]:
        """Return those of `parts` that are missing. All are tried at once, and halves of them where that tells nothing."""
        there = self._in_place(turns, text, parts) if len(parts) > 1 else ()
        rest = [part for part in parts if part.index not in there]
        if not rest or not self._changes(text, _replaced(turns, [(part, part.other) for part in rest])):
            return rest  # a text that does not change without any of them has none of them
        half = len(rest) // 2
        return [*self._lost(turns, text, rest[:half]), *self._lost(turns, text, rest[half:])] if half else []

    def _in_place(self, turns: Turns, text: str, parts: Sequence[Part]) -> Collection[int]:
        """Return the indices of parts that are present for sure: those whose marks are rendered where `text`, which must be equal
        otherwise, has their words. A template that renders marks by another branch than the words makes another text."""
        marked = [(part, *part.marked()) for part in parts]
        try:
            first, *pieces = _MARK.split(self._render(_replaced(turns, [(part, value) for part, value, _ in marked])))
        except UserError:
            return ()
        forms = {str(part.index): (words, json.dumps(words, ensure_ascii=False)[1:-1]) for part, _, words in marked}
        at, indices = len(first) if text.startswith(first) else -1, pieces[::2]
        for index, after in zip(indices, pieces[1::2], strict=True):
            found = (each + after for each in forms.get(index, ()) if at >= 0 and text.startswith(each + after, at))
            at = at + len(piece) if (piece := next(found, None)) is not None else -1
        return {int(index) for index in indices} if at == len(text) else ()

    def _changes(self, text: str, others: Turns) -> bool:
        try:
            return self._render(others) != text
        except UserError:  # it refuses the replacement, so it reads that part
            return True


def _digest(turns: Turns, parts: Sequence[Part]) -> bytes:
    """Return a hash of the shape of a conversation with these parts."""
    shape = [*map(_shape, turns), *((part.number, part.what) for part in parts)]
    return hashlib.blake2b(repr(shape).encode(), digest_size=16).digest()


def _plain_shape(turns: Turns) -> tuple[tuple[str, bool], ...] | None:
    """Return the roles of a few turns that have words alone, and no thoughts among them, and which of them are blank; None for
    other turns."""
    shape = list[tuple[str, bool]]()
    for turn in turns if len(turns) <= FEW_TURNS else ():
        role, content = turn.get("role"), turn.get("content")
        if len(turn) != 2 or type(role) is not str or type(content) is not str or "think>" in content:
            return None
        shape.append((role, not content or content.isspace()))
    return tuple(shape) or None


@lru_cache(1000)
def _digest_of_plain(shape: Sequence[tuple[str, bool]]) -> bytes:
    """Return the `_digest` of turns by their `_plain_shape`."""
    turns = tuple({"role": role, "content": "" if is_blank else "x"} for role, is_blank in shape)
    return _digest(turns, _all_parts(turns, ()))


def _shape(turn: Message) -> tuple[Any, ...]:
    """Return what a template may test of a turn besides its words."""
    return turn["role"], *sorted(turn), len(turn.get("tool_calls") or ()), *sorted(turn.get(SETTINGS, ()))


def _replaced(turns: Turns, values: Sequence[tuple[Part, Any]]) -> Turns:
    """Return turns with other values of some parts, given in their order."""
    changed = list(turns)
    for part, value in reversed(values):  # the last first: places in the text before it stay as they are
        changed[part.number] = part.put(changed[part.number], value)
    return tuple(changed)


def _all_parts(turns: Turns, learned: Collection[int]) -> list[Part]:
    found = chain.from_iterable(_parts(n, turn, learned=n in learned) for n, turn in enumerate(turns))
    return [Part(index, *part) for index, part in enumerate(found)]


def _parts(number: int, turn: Message, *, learned: bool) -> Iterator[tuple[int, str, str, Any, Put, bool]]:
    """Yield each part of a turn, without its index."""
    role, content = turn["role"], str(turn.get("content") or "")
    thought = LEARNED if learned else EARLIER
    for start, end, is_thought in _pieces(content) if role == "assistant" else [(0, len(content), False)]:
        if piece := content[start:end].strip():
            what = thought if is_thought else "a tool's result" if role == "tool" else f"words of the {role}"
            put = partial(_put_words, "content", content.index(piece, start), len(piece))
            yield number, role, what, piece, put, learned or not is_thought
    if role == "assistant" and (piece := turn.get(REASONING, "").strip()):
        put = partial(_put_words, REASONING, turn[REASONING].index(piece), len(piece))
        yield number, role, f"{thought}, {REASONING}", piece, put, learned
    yield from ((number, role, *part, True) for part in _tool_call_parts(turn))
    if SETTINGS in turn and (tools := turn[SETTINGS].get("tools")):
        yield number, role, "the tools", tools, _put_tools, True


def _pieces(content: str) -> Iterator[tuple[int, int, bool]]:
    """Yield the start and end of what an assistant turn has before, between and after its tags of thoughts, and whether it is a
    thought: what stands before `</think>`."""
    start = 0
    for tag in _THINK_TAG.finditer(content):
        yield start, tag.start(), tag[0] == "</think>"
        start = tag.end()
    yield start, len(content), False


def _tool_call_parts(turn: Message) -> Iterator[tuple[str, Any, Put]]:
    for number, call in enumerate(turn.get("tool_calls") or ()):
        for key in ("name", "arguments"):
            value = _function(call).get(key)
            if value not in (None, "", {}):
                yield f"the {key} of a tool call", value, partial(_put_in_call, number, key)


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    return function if isinstance(function, Mapping) else call


def _put_words(name: str, start: int, length: int, turn: Message, words: str) -> Message:
    return {**turn, name: turn[name][:start] + words + turn[name][start + length :]}


def _put_tools(turn: Message, tools: Any) -> Message:
    return {**turn, SETTINGS: {**turn[SETTINGS], "tools": tools}}


def _put_in_call(number: int, key: str, turn: Message, value: Any) -> Message:
    calls: list[Mapping[str, Any]] = list(turn["tool_calls"])
    call, inner = calls[number], _function(calls[number])
    calls[number] = {**inner, key: value} if inner is call else {**call, "function": {**inner, key: value}}
    return {**turn, "tool_calls": calls}
