"""Checks of a chat template by a few made-up conversations, whatever turns the data have."""

import re
from collections.abc import Iterable

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from halos.inspection.findings import Check, Finding

MARK = re.compile(r"<\|[\w-]+\|>|<\w+_of_\w+>")  # <|im_end|>, <end_of_turn>
RULES, QUESTION, ANSWER, MORE = "halos0rules", "halos0question", "halos0answer", "halos0more"


def checks_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Check, ...]:
    """Check the template that a run uses. Rows that it would harm are refused one by one where they are read: these are notes."""
    probe = _Probe(tokenizer)
    return (
        Check("the chat template renders system turns", tuple(_system(probe))),
        Check("earlier text stays as it was when a turn is added", tuple(_prefix(probe))),
        Check("the marks that the chat template writes are tokens", tuple(_marks(probe, tokenizer))),
    )


class _Probe:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def render(self, *turns: tuple[str, str], generate: bool = False) -> str | None:
        """Return a conversation of (role, words) as text; None where the template refuses it."""
        messages = [{"role": role, "content": words} for role, words in turns]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return None
        assert isinstance(text, str)
        return text


def _system(probe: _Probe) -> Iterable[Finding]:
    text = probe.render(("system", RULES), ("user", QUESTION), generate=True)
    if text is None:
        yield Finding("note", "the chat template refuses system turns, and rows with one would be refused")
    elif RULES not in text:
        yield Finding("note", "the chat template leaves system turns out, and rows with one would be refused")


def _marks(probe: _Probe, tokenizer: PreTrainedTokenizerBase) -> Iterable[Finding]:
    text = probe.render(("user", QUESTION), ("assistant", ANSWER)) or ""
    spelled = [mark for mark in dict.fromkeys(MARK.findall(text)) if len(tokenizer.encode(mark, add_special_tokens=False)) > 1]
    if spelled:
        marks = ", ".join(spelled)
        yield Finding(
            "note", f"the chat template writes {marks}, which the tokenizer spells out: no single tokens", (),
            f"'model.add_tokens=[{','.join(repr(mark) for mark in spelled)}]' makes them tokens, or another model.chat_template",
        )  # fmt: skip


def _prefix(probe: _Probe) -> Iterable[Finding]:
    asked, answered = ("user", QUESTION), ("assistant", ANSWER)
    prompt, whole = probe.render(asked, generate=True), probe.render(asked, answered)
    longer = probe.render(asked, answered, ("user", MORE), generate=True)
    if prompt is not None and whole is not None and not whole.startswith(prompt):
        text = "the chat template renders a prompt otherwise once it is answered than as a sampler gets it"
        yield Finding("note", text, (), "what completions begin with is counted with the rows that differ")
    if whole is not None and longer is not None and not longer.startswith(whole.rstrip()):
        text = "the chat template changes an answer once another turn follows"
        yield Finding(
            "note",
            text,
            (),
            "of a row with several scored turns (data.score=all) each becomes an example; a pair of such is refused",
        )
