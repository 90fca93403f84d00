"""Render turns by a chat template, each part under the name and in the form that the template reads."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from halos.data.messages import OURS, REASONING, REASONING_NAMES, SETTINGS, SYSTEM
from halos.errors import UserError
from halos.examples import Message

log = logging.getLogger(__name__)

WORD = "halos0developer"
PLAIN_ROLES = ("system", "user", "assistant", "tool")  # which every template gets as they are
FIRST, CHECKED = 8, 64  # conversations of words alone that transformers renders too: the first, and one of so many
_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError)


def system_remedy(turns: Sequence[Message]) -> str:
    """Return what helps a template without a system role, for turns with one."""
    return "; data.system=merge puts a system turn into the first user turn" if turns and turns[0]["role"] in SYSTEM else ""


class Renderer:
    """A chat template of a tokenizer; what it cannot read in one form it gets in another, which is tried once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, jinja: str, *, refuse_tools: bool = True) -> None:
        """With `refuse_tools` a row with tools is refused where the template never reads them; else they are left out."""
        self._tokenizer, self.jinja, self._refuse_tools = tokenizer, jinja, refuse_tools
        self._text_arguments = False  # whether arguments of tool calls are given as JSON text (DeepSeek-V3)
        self._developer: str | None = None  # the role of a developer's turn, once it is known
        self._of_words = _OfWords(tokenizer, jinja)

    def __call__(self, turns: Sequence[Message], where: str, *, generate: bool) -> str:
        """Raises UserError, naming the row, where the template refuses it."""
        plain, settings = [self._plain(turn) for turn in turns], (turns[0].get(SETTINGS) if turns else None) or {}
        if unread := [name for name in settings if self._refuses(name)]:
            raise UserError(
                f"{where}: the chat template does not read {', '.join(unread)}, which the row gives it; give another"
                " model.chat_template, or leave them out, "
                + (
                    "'data.columns={tools: null}' (or functions, where the row has those) or data.lost=keep"
                    if "tools" in unread
                    else f"'data.columns={{{SETTINGS}: null}}'"
                )
            )
        try:
            text = self._apply(plain, settings, generate=generate)
            return text if self._text_arguments else self._without_python(plain, text, settings, generate=generate)
        except _ERRORS as error:
            if not self._text_arguments and any("tool_calls" in turn for turn in turns):
                try:
                    text = self._apply(_with_text_arguments(plain), settings, generate=generate)
                except _ERRORS:
                    pass
                else:
                    self._text_arguments = True
                    return text
            raise UserError(f"{where}: the chat template refuses this row: {error}{system_remedy(turns)}") from error

    def _refuses(self, setting: str) -> bool:
        needed = self._refuse_tools or setting != "tools"
        return needed and not re.search(rf"\b{re.escape(setting)}\b", self.jinja)

    def _without_python(self, plain: list[dict[str, Any]], text: str, settings: Mapping[str, Any], *, generate: bool) -> str:
        """Return a rendering with arguments of tool calls as JSON, where `text` has them as Python prints an object: a template
        that prints them as they are expects text (Functionary)."""
        for printed in [str(arguments) for turn in plain if "tool_calls" in turn for arguments in _arguments(turn)
                        if arguments]:  # fmt: skip
            if printed in text:
                given = self._apply(_with_text_arguments(plain), settings, generate=generate)
                if text.count(printed) > given.count(printed):  # else they are words of another turn
                    self._text_arguments = True
                    return given
        return text

    def _apply(self, plain: list[dict[str, Any]], settings: Mapping[str, Any], *, generate: bool) -> str:
        turns = _with_text_arguments(plain) if self._text_arguments else plain
        if not settings and (words := self._of_words.render(turns, generate=generate)) is not None:
            return words
        text = self._tokenizer.apply_chat_template(
            turns, chat_template=self.jinja, tokenize=False, add_generation_prompt=generate, **settings
        )
        assert isinstance(text, str)
        return text

    def _plain(self, turn: Message) -> dict[str, Any]:
        if len(turn) == 2 and type(turn.get("content")) is str and turn["role"] in PLAIN_ROLES:
            return dict(turn)  # as most are
        # transformers drops null keys from 5.18 on; templates print None where they meet it.
        plain = {name: value for name, value in turn.items() if value is not None and name not in OURS}
        if REASONING in plain:
            plain |= dict.fromkeys(REASONING_NAMES, plain[REASONING])
        if plain["role"] == "developer":
            plain["role"] = self._developer_role()
        if "content" not in plain and plain["role"] == "assistant":
            plain["content"] = ""  # of a turn of tool calls; some templates join it to other text
        return plain

    def _developer_role(self) -> str:
        """Return the role of a developer's turn: system where the template knows a developer's not."""
        if self._developer is None:
            known = (role for role in ("developer", "system") if self._knows(role))
            self._developer = next(known, "developer")
        return self._developer

    def _knows(self, role: str) -> bool:
        try:
            turns = [{"role": role, "content": WORD}, {"role": "user", "content": "x"}]
            return WORD in self._apply(turns, {}, generate=False)
        except _ERRORS:
            return False


class _OfWords:
    """Renders turns of words alone as transformers does, but for copying each value that the template gets, which takes as long
    as the rendering. The first few and one of CHECKED are rendered by transformers too; after another text it renders all."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, jinja: str) -> None:
        self._tokenizer, self._jinja, self._count = tokenizer, jinja, 0
        self._template: Any = None
        if type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template:
            with suppress(*_ERRORS, ImportError):  # a template that cannot be compiled is reported where it renders
                self._template = vars(chat_template_utils).get("_compile_jinja_template", lambda _: None)(jinja)

    def render(self, turns: list[dict[str, Any]], *, generate: bool) -> str | None:
        """Return the text; None where transformers is to render it."""
        if self._template is None or not all([len(turn) == 2 and type(turn.get("content")) is str for turn in turns]):
            return None
        try:
            text = self._template.render(messages=turns, tools=None, documents=None, add_generation_prompt=generate,
                                         **self._tokenizer.special_tokens_map)  # fmt: skip
        except Exception:  # the same of transformers is reported
            return None
        self._count += 1
        if (self._count <= FIRST or self._count % CHECKED == 0) and text != self._tokenizer.apply_chat_template(
            turns, chat_template=self._jinja, tokenize=False, add_generation_prompt=generate
        ):
            log.warning(
                "transformers renders a conversation otherwise than by its compiled template: it renders all from here on"
            )
            self._template = None
            return None
        return text


def _arguments(turn: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the arguments of a turn's tool calls that are objects."""
    for call in turn.get("tool_calls") or ():
        function = call.get("function")
        arguments = (function if isinstance(function, Mapping) else call).get("arguments")
        if isinstance(arguments, Mapping):
            yield arguments


def _with_text_arguments(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**turn, "tool_calls": [_as_text(call) for call in turn["tool_calls"]]} if "tool_calls" in turn else turn
            for turn in turns]  # fmt: skip


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _as_text(call["function"])}
    arguments = call.get("arguments")
    text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments
    return {**call, **({"arguments": text} if "arguments" in call else {})}
