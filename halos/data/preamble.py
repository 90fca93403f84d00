"""First lines of a chat template, by which data.chat_template_kwargs and data.system reach samplers and servers too."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from halos.errors import UserError

TAKEN = ("messages", "add_generation_prompt")  # names that a template gets in any case
MERGE = """\
{%- if messages|length > 1 and messages[0]['role'] in ('system', 'developer') and messages[1]['role'] == 'user' %}\
{%- set messages = [dict(messages[1], content=messages[0]['content'] ~ '\\n\\n' ~ messages[1]['content'])] + messages[2:] %}\
{%- endif %}
"""
_LINE = re.compile(r"\{%- if (\w+) is not defined or \1 is none %\}.*\n")


def with_preamble(template: str, settings: Mapping[str, Any], *, merges_system: bool) -> str:
    """Return `template` after lines that give `settings` (data.chat_template_kwargs) where a conversation has none of its own,
    and that put a system turn into the first user turn. Raises UserError for a setting that the template does not read.
    """
    own = without_preamble(template)
    for name in settings:
        if not name.isidentifier() or name in TAKEN:
            raise UserError(f"data.chat_template_kwargs: {name!r} is no name of a setting")
        if not re.search(rf"\b{name}\b", own):
            raise UserError(f"data.chat_template_kwargs.{name}: the chat template does not read it")
    kept = template[: len(template) - len(own)]
    lines = [_default(name, value) for name, value in settings.items()]
    lines += [line for line in kept.splitlines(keepends=True) if line != MERGE and _name(line) not in settings]
    return "".join(lines) + (MERGE if merges_system or MERGE in kept else "") + own


def without_preamble(template: str) -> str:
    """Return the family's own template."""
    while match := _LINE.match(template):
        template = template[match.end() :]
    return template.removeprefix(MERGE)


def _name(line: str) -> str | None:
    match = _LINE.match(line)
    return match[1] if match else None


def _default(name: str, value: Any) -> str:
    return f"{{%- if {name} is not defined or {name} is none %}}{{%- set {name} = {_literal(value, name)} %}}{{%- endif %}}\n"


def _literal(value: Any, name: str) -> str:
    """Return a value as an expression of Jinja."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, str):  # no brace or percent sign, which could end the block
        return re.sub("[{}%#]", lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key), name)}: {_literal(part, name)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(part, name) for part in value) + "]"
    raise UserError(f"data.chat_template_kwargs.{name} is {value!r}: it takes what JSON can hold")
