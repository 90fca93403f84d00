"""The date that a chat template writes: one for all of a run, so that its resumes, epochs and samplers render the same text."""

import calendar
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

NAME = "strftime_now"  # by which a template writes the date
_LINE = re.compile(r'\{%- macro strftime_now\(format, day="([\d-]+)"\) %\}.*\n')
_LETTERS = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
_DIRECTIVES = frozenset(f"%{flag}{letter}" for flag in ("", "-") for letter in _LETTERS) | {"%f"}
_OTHERS = re.compile(r"%[-_^#]*\d*[EO]?[A-Za-z]")  # of glibc, which are read where they stand in the template
_MOMENTS = (datetime(2000, 1, 1, 1, 1, 1, 1), datetime(2011, 11, 11, 23, 11, 11, 11))  # which no directive writes alike
_TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}}


def with_date(template: str, day: date) -> str:
    """Return `template` after a line that has it write `day` as the current date, in whatever format, which it may get from a
    row or compute."""
    own, percent = without_date(template), _quoted("%")
    values = {directive: _written(day, directive) for directive in sorted(_DIRECTIVES | {*_OTHERS.findall(own)})}
    listed = ", ".join(f"{_quoted(key)}: {_quoted(value)}" for key, value in values.items() if value != key)
    return (
        f'{{%- macro {NAME}(format, day="{day:%Y-%m-%d}") %}}'
        f"{{%- for part in format.split({_quoted('%%')}) %}}{{{{- '' if loop.first else {percent} }}}}"
        f"{{%- set written = namespace(text=part) %}}{{%- for directive, value in {{{listed}}}.items() %}}"
        "{%- set written.text = written.text.replace(directive, value) %}{%- endfor %}{{- written.text }}{%- endfor %}"
        f"{{%- endmacro %}}\n{own}"
    )


def _written(day: date, directive: str) -> str:
    if directive.endswith("s"):  # seconds, which Python counts in the time zone of the machine
        return str(calendar.timegm(day.timetuple()))
    return day.strftime(directive)


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


def may_write_date(template: str) -> bool:
    """Return whether the template names the current date or time: a setting of a row may decide whether it writes one."""
    return NAME in template


def writes_date(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Return whether the template writes the current date or time in a common conversation: of one turn or several, with or
    without a system turn or tools. It may write one in others."""
    if not may_write_date(template):
        return False
    asked: Message = {"role": "user", "content": "a"}
    several: tuple[Message, ...] = (asked, {"role": "assistant", "content": "b"}, asked)
    for turns in ((asked,), ({"role": "system", "content": "b"}, asked), several):
        for settings in ({}, {"tools": [_TOOL]}):
            first: Message = {**turns[0], SETTINGS: settings}
            texts = {_rendered(tokenizer, with_date(template, moment), (first, *turns[1:])) for moment in _MOMENTS}
            if len(texts) > 1:
                return True
    return False


def refuse_unwritten(day: str | None, *written: str | None) -> None:
    """Raises UserError for a data.date where no chat template of the run writes a date; `written` are those that they write."""
    if day is not None and not any(written):
        raise UserError(f"data.date={day}: the chat template writes no date: leave it out")


def content_entry(*written: str | None) -> dict[str, str | None]:
    """Return the entry among a run's content hashes of the date that its chat templates write, where no hash of rows shows it;
    none where they write no date."""
    return {} if (day := next(filter(None, written), None)) is None else {"data.date": day}


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str, turns: tuple[Message, ...]) -> str | None:
    try:
        return Renderer(tokenizer, template, refuse_tools=False)(turns, "a prompt", generate=True)
    except UserError:
        return None


def _quoted(text: str) -> str:
    """Return text as a literal of Jinja, without a percent sign, which could end the block."""
    return json.dumps(text).replace("%", "\\u0025")
