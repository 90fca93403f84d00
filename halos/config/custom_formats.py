"""Custom values of data.format: dotted paths of user functions that turn a row into an example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halos.config.schema import Data
from halos.config.signature import import_target, positional, required
from halos.errors import UserError


def is_custom(format: Any) -> bool:
    """Return whether a format is the dotted path of a function rather than a built-in name."""
    return isinstance(format, str) and "." in format


def load_format(target: str, key: str, plugins: Sequence[str]) -> Callable[[dict[str, Any]], Any]:
    """Import the function that `key` names. Raises UserError where it is no function of one row."""
    function, _ = import_target(target, key, plugins, example="mypackage.rows")
    row = positional(function)[:1] if callable(function) else []
    if not row or set(required(function)) - set(row):
        raise UserError(f"{key}: {target} is no format: it must be a function of one row, which is a dict of its columns")
    return function


def custom_formats(data: Data) -> dict[str, str]:
    """Return key -> dotted path for every custom format of a run's data."""
    paths = {"data.format": str(data.format)} if is_custom(data.format) else {}
    for purpose in ("train", "eval"):
        for number, entry in enumerate(getattr(data, purpose)):
            if isinstance(entry, Mapping) and is_custom(entry.get("format")):
                paths[f"data.{purpose}.{number}.format"] = entry["format"]
    return paths
