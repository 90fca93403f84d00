"""What data.format may name: a format that is known here, or a function of the user's own from a row to an example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halos.config.schema import Data
from halos.config.signature import import_target, positional, required
from halos.errors import UserError


def is_custom(format: Any) -> bool:
    """Whether a format is the dotted path of a function rather than a name."""
    return isinstance(format, str) and "." in format


def load_format(target: str, key: str, plugins: Sequence[str]) -> Callable[[dict[str, Any]], Any]:
    """The function that `key` names. Raises UserError for what is none."""
    function, _ = import_target(target, key, plugins, example="mypackage.rows")
    given = positional(function)[:1] if callable(function) else []
    if not given or set(required(function)) - set(given):
        raise UserError(f"{key}: {target} is no reader of rows: it must be a function of one row, which is a dict of its columns")
    return function


def custom_formats(data: Data) -> dict[str, str]:
    """key -> dotted path, of every function of the user's own that rows go through."""
    found = {"data.format": str(data.format)} if is_custom(data.format) else {}
    for purpose in ("train", "eval"):
        for number, entry in enumerate(getattr(data, purpose)):
            if isinstance(entry, Mapping) and is_custom(entry.get("format")):
                found[f"data.{purpose}.{number}.format"] = entry["format"]
    return found
