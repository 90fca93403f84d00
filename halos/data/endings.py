"""Find the token that ends an assistant turn, by rendering a conversation with and without what follows the turn."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from halos.errors import UserError
from halos.examples import Message, Turns

WORD, ASKED, NAME = "halos0answer", "halos0question", "halos0name"
CALL_ID = "call00001"  # nine letters or digits, as Mistral's templates demand
Render = Callable[[Turns], str]


@dataclass(frozen=True, slots=True)
class Ending:
    """What a template writes after the words of an assistant turn."""

    tail: str  # at the end of a conversation
    token: str  # the token that ends the turn, and what tokens stand between it and the words; empty where there is none
    rest: str  # of the tail, after the token
    everywhere: bool = False  # turns that others follow end with it too
    written: bool = True  # at the end of a conversation; else only by what follows, as GLM-4.5 ends a turn with <|user|>


class Endings:
    """The endings of turns with words and of turns with tool calls, each found once."""

    def __init__(
        self, render: Render, special: re.Pattern[str], added: re.Pattern[str], *, bos: str | None, eos: str | None
    ) -> None:
        self._render, self._patterns, self._bos, self._eos = render, (special, added), bos, eos
        self._known: dict[bool, Ending] = {}

    def of(self, turn: Message, before: Turns) -> Ending:
        """Return the ending of turns like `turn`. `before` serves where the template refuses a plain question."""
        calls = bool(turn.get("tool_calls"))
        if calls not in self._known:
            self._known[calls] = self._find(calls, before)
        return self._known[calls]

    def _find(self, calls: bool, before: Turns) -> Ending:
        asked: Turns = ({"role": "user", "content": ASKED},)
        if self._try(asked) is None:
            asked = before
        tail = self._after(self._try((*asked, _answer(WORD, calls=calls))))
        if tail is None:  # the template refuses such turns, or leaves calls out: what else they say ends as plain words do
            return self.of(_answer(WORD, calls=False), before) if calls else Ending("", "", "")
        result = {"role": "tool", "content": ASKED, "name": NAME, "tool_call_id": CALL_ID}
        followed = (*asked, _answer(WORD, calls=calls), result if calls else {"role": "user", "content": ASKED + "2"})
        gap = self._after(self._try(followed)) or self._after(self._try((*followed, _answer("x", calls=False))))
        return next((ending for pattern in self._patterns if (ending := self._ending(tail, gap, pattern))), Ending(tail, "", ""))

    def _ending(self, tail: str, gap: str | None, pattern: re.Pattern[str]) -> Ending | None:
        """Return the ending by tokens of one pattern; None where it has none."""
        shared = tail if gap is None else tail[: common(tail, gap)]
        if tokens := list(pattern.finditer(shared)):
            return _cut(tail, self._without_next_turn(tokens, pattern), everywhere=gap is not None)
        if tokens := list(pattern.finditer(tail)):
            return _cut(tail, tokens, everywhere=False)
        after = (gap or "")[len(tail.rstrip()) :]
        token = pattern.match(after.lstrip()) if (gap or "").startswith(tail.rstrip()) else None
        if token and token[0] != self._bos:
            return Ending(tail, token[0], "", everywhere=True, written=False)
        return None

    def _without_next_turn(self, tokens: list[re.Match[str]], pattern: re.Pattern[str]) -> list[re.Match[str]]:
        """Return the tokens before those of a next turn, which some templates begin even where there is none."""
        if len(tokens) == 1:
            return tokens
        ends = [n for n, token in enumerate(tokens) if token[0] == self._eos]
        opening = set() if ends else self._opening(pattern)
        closing = ends or [n for n, token in enumerate(tokens) if token[0] not in opening]
        return tokens[: closing[-1] + 1] if closing else tokens[:1]

    def _opening(self, pattern: re.Pattern[str]) -> set[str]:
        """Return the tokens before the first words of a conversation, none of which ends a turn."""
        first = {"role": "system", "content": WORD}
        text = self._try((first, {"role": "user", "content": ASKED})) or ""
        if WORD not in text:
            text = self._try(({"role": "user", "content": WORD},)) or ""
        return set(pattern.findall(text.partition(WORD)[0]))

    def _try(self, turns: Turns) -> str | None:
        try:
            return self._render(turns)
        except UserError:
            return None

    @staticmethod
    def _after(text: str | None) -> str | None:
        return None if text is None or WORD not in text else text.rpartition(WORD)[2]


def _answer(word: str, *, calls: bool) -> Message:
    if not calls:
        return {"role": "assistant", "content": word}
    call = {"type": "function", "id": CALL_ID, "function": {"name": NAME, "arguments": {NAME: word}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


CALL = _answer(WORD, calls=True)


def _cut(tail: str, tokens: list[re.Match[str]], *, everywhere: bool) -> Ending:
    start, end = tokens[0].start(), tokens[-1].end()
    return Ending(tail, tail[start:end], tail[end:], everywhere)


def common(one: str, other: str) -> int:
    """Return the length of the longest common prefix."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
