"""The date that a chat template writes: one for all of a run, so that its resumes, epochs and samplers render the same text."""

import json
import re
from copy import copy
from datetime import date, datetime
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from halos.data.messages import SETTINGS
from halos.data.rendering import Renderer
from halos.errors import UserError
from halos.examples import Message

_LINE = re.compile(r'\{%- macro strftime_now\(format, day="([\d-]+)"\) %\}.*\n')
_DIRECTIVE = re.compile(r"%-?[A-Za-z]|%%")
_MOMENTS = (datetime(2000, 1, 1, 1, 1, 1), datetime(2011, 11, 11, 23, 11, 11))  # which no directive writes alike
_TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}}


def with_date(template: str, day: date) -> str:
    """Return `template` after a line that has it write `day` as the current date."""
    own = without_date(template)
    found = sorted(set(_DIRECTIVE.findall(own)), reverse=True)  # %% last
    replaced = "".join(f"|replace({_quoted(directive)}, {_quoted(day.strftime(directive))})" for directive in found)
    return f'{{%- macro strftime_now(format, day="{day:%Y-%m-%d}") %}}{{{{ format{replaced} }}}}{{%- endmacro %}}\n{own}'


def without_date(template: str) -> str:
    """Return the template as it is saved with a model: it writes the date of the day on which it is used."""
    return _LINE.sub("", template, count=1) if _LINE.match(template) else template


def save_undated(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save a tokenizer with its template as `without_date`."""
    saved = copy(tokenizer)
    saved.chat_template = without_date(str(tokenizer.chat_template))
    saved.save_pretrained(directory)


def date_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the day that a tokenizer's template writes, set by `with_date`; None where it writes none."""
    return match[1] if (match := _LINE.match(str(tokenizer.chat_template))) else None


def writes_date(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Return whether the template writes the current date or time, in a conversation with or without a system turn or tools."""
    if "strftime_now" not in template:
        return False
    asked: Message = {"role": "user", "content": "a"}
    for turns in ((asked,), ({"role": "system", "content": "b"}, asked)):
        for settings in ({}, {"tools": [_TOOL]}):
            first: Message = {**turns[0], SETTINGS: settings}
            texts = {_rendered(tokenizer, with_date(template, moment), (first, *turns[1:])) for moment in _MOMENTS}
            if len(texts) > 1:
                return True
    return False


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str, turns: tuple[Message, ...]) -> str | None:
    try:
        return Renderer(tokenizer, template, refuse_tools=False)(turns, "a prompt", generate=True)
    except UserError:
        return None


def _quoted(text: str) -> str:
    """Return text as a literal of Jinja, without a percent sign, which could end the block."""
    return json.dumps(text).replace("%", "\\u0025")
