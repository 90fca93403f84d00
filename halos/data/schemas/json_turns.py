"""Turns as JSON text: csv files hold them so, and tables whose columns are all text."""

import json
import re
from typing import Any

from halos.data.schemas.schema import Change, Columns, Schema
from halos.data.schemas.sharegpt import TURNS, is_turn
from halos.errors import UserError

_JSON, _PYTHON = re.compile(r"\s*(\[\s*)?\{"), re.compile(r"\s*(array\()?\[\s*\{'(role|from|content|value)'")


def apply(columns: Columns, where: str) -> Change | None:
    """Parse the columns that hold turns as text. Raises UserError for turns as Python prints them."""
    found = {name: turns for name in TURNS if isinstance(text := columns.get(name), str)
             and (turns := turns_in(text, name, where)) is not None}  # fmt: skip
    return Change({**columns, **found}, "with turns as JSON text") if found else None


def turns_in(text: str, column: str, where: str) -> list[Any] | None:
    """Return the turns that text holds, a list of objects with one at least, or one; None for other text."""
    if not _JSON.match(text) and not _PYTHON.match(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if _PYTHON.match(text):
            raise UserError(f"{where}: {column} is a list of messages as Python prints it: write it as JSON") from None
        return None
    turns = value if isinstance(value, list) else [value]
    return turns if any(map(is_turn, turns)) else None


SCHEMA = Schema(
    "turns as text", f"{', '.join(f'`{name}`' for name in TURNS)} as JSON of turns, `{{role, content}}` or `{{from, value}}`",
    "these turns", apply,
    {"prompt": '[{"role": "user", "content": "Hi"}]', "completion": "Hello!"}, {"prompt": "Hi", "completion": "Hello!"},
)  # fmt: skip
