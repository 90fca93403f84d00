"""Dotted paths of user functions: of data.format, from a row to an example, and of data.reader, from a path to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos.config.schema import Data
from halos.config.signature import import_target, positional, required
from halos.errors import UserError

CODE = ("format", "reader")  # keys of data, and of its entries, that name code


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


def load_reader(target: str, key: str, plugins: Sequence[str]) -> Callable[[Path], Iterable[Any]]:
    """Import the function that `key` names. Raises UserError where it is no function of one path."""
    function, _ = import_target(target, key, plugins, example="mypackage.read")
    path = positional(function)[:1] if callable(function) else []
    if not path or set(required(function)) - set(path):
        raise UserError(f"{key}: {target} is no reader: it must be a function of one path, which yields rows")
    return function


def custom_formats(data: Data) -> dict[str, str]:
    """Return key -> dotted path for every custom format and reader of a run's data."""
    common = {"data.format": data.format, "data.reader": data.reader}
    paths = {key: str(value) for key, value in common.items() if is_custom(value)}
    for purpose in ("train", "eval"):
        for number, entry in enumerate(getattr(data, purpose)):
            for name in CODE if isinstance(entry, Mapping) else ():
                if is_custom(entry.get(name)):
                    paths[f"data.{purpose}.{number}.{name}"] = entry[name]
    return paths
