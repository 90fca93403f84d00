"""Convert values to types, and describe types and values in messages; without torch."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
LISTS = (list, tuple, set, frozenset, Sequence)
MAPPINGS = (dict, Mapping)


class MisfitError(ValueError):
    """The value does not fit the type; the caller knows the key and reports it."""


def is_fixed(kind: Any) -> bool:
    """Return whether a type is a tuple of fixed length."""
    return get_origin(kind) is tuple and Ellipsis not in get_args(kind)


def describe(kind: Any) -> str:
    """Describe the values of a type: `a number or null`."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return " or ".join(describe(part) for part in get_args(kind))
    if origin is Literal:
        return " or ".join(part if isinstance(part, str) else show(part) for part in get_args(kind))
    if is_fixed(kind):
        return f"[{', '.join(map(describe, get_args(kind)))}]"
    if (origin or kind) in LISTS:
        return "a list"
    if (origin or kind) in MAPPINGS or is_dataclass(kind):
        return "a mapping"
    return NAMES.get(kind, "a value")


def show(value: Any) -> str:
    """Return a value as it is written on the command line."""
    words = {True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return "null" if value is None else words[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {show(part)}" for name, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show, value)) + "]"
    return repr(value)


def quoted(value: Any) -> str:
    """Quote any text for Hydra's grammar."""
    text = re.sub(r"(\\*)(?:\Z|(?='))", r"\1\1", str(value)).replace("'", "\\'")
    return f"'{text}'"


def typed(value: Any) -> str:
    """Return a value in Hydra's grammar, with text quoted at any depth; names in a mapping are as they are."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{typed(part)}" for name, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(typed, value)) + "]"
    return quoted(value) if isinstance(value, str) else show(value)


def as_argument(key: str, value: Any) -> str:
    """Return `key=value` for a shell, quoted for Hydra where necessary, and then for the shell."""
    plain = isinstance(value, str | Path) and re.fullmatch(r"[\w./@:+-]+", str(value), re.ASCII)
    return shlex.quote(f"{key}={value}" if plain else f"{key}={quoted(value)}")


def fit(value: Any, kind: Any) -> Any:
    """Convert `value` to a `kind`; numbers may be text, since YAML reads 1e-5 as text. Raises MisfitError."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _fit_one_of(value, parts)
    if origin is Literal:
        if not any(value == part and type(value) is type(part) for part in parts):
            raise MisfitError
        return value
    if (origin or kind) in LISTS:
        if not isinstance(value, (list, tuple)) or (is_fixed(kind) and len(value) != len(parts)):
            raise MisfitError
        if is_fixed(kind):
            return tuple(fit(entry, part) for entry, part in zip(value, parts, strict=True))
        return [fit(part, parts[0] if parts else Any) for part in value]
    if (origin or kind) in MAPPINGS:
        if not isinstance(value, Mapping):
            raise MisfitError
        return {name: fit(part, parts[1] if parts else Any) for name, part in value.items()}
    return _fit_scalar(value, kind)


def _fit_one_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in sorted(kinds, key=lambda kind: kind is str):  # text fits anything, so it is tried last
        try:
            return fit(value, kind)
        except MisfitError:
            continue
    raise MisfitError


def _fit_scalar(value: Any, kind: Any) -> Any:
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = kind(value)
        except (ValueError, OverflowError) as error:
            raise MisfitError from error
        if not math.isfinite(number) or (kind is int and not isinstance(value, str) and number != value):
            raise MisfitError
        return number
    if kind is NoneType and value is None:
        return None
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise MisfitError
