"""Check values against the ranges of the schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from halos.config.schema import Config
from halos.config.suggest import nearest
from halos.config.values import describe, show
from halos.errors import UserError


def check_ranges(node: Any, schema: Any = Config, prefix: str = "", *, spelled: Callable[[str], str] = str) -> None:
    """Check every value against its limits; interpolations and missing values are checked by a second call, once resolved.

    Raises UserError. `spelled` maps a key to its name where the user set it.
    """
    hints = _hints(schema)
    for field in fields(schema):
        key, value = prefix + field.name, node.get(field.name)
        section = next((part for part in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(part)), None)
        if section and isinstance(value, Mapping):
            check_ranges(value, section, f"{key}.", spelled=spelled)
        elif (limits := field.metadata.get("limits")) and value is not None and not _is_open(value):
            _check_range(spelled(key), value, limits, describe(hints[field.name]))


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


def _is_open(value: Any) -> bool:
    """Return whether a value is an interpolation or missing."""
    return isinstance(value, str) and ("${" in value or value == "???")


def _check_range(key: str, value: Any, limits: Mapping[str, Any], kind: str) -> None:
    if "one_of" in limits:
        if value not in limits["one_of"]:
            near = nearest(str(value), limits["one_of"])
            meant = f" (did you mean {near}?)" if near else ""
            null = " or null" if kind.endswith("null") else ""
            raise UserError(f"{key} takes {', '.join(limits['one_of'])}{null}, not {show(value)}{meant}")
        return
    if isinstance(value, str) and value in limits.get("words", ()):
        return
    words = {"above": "above", "least": "at least", "most": "at most"}
    bounds = " and ".join(f"{words[name]} {limits[name]:g}" for name in words if name in limits)
    in_range = (
        not isinstance(value, str)
        and value > limits.get("above", float("-inf"))  # written so that nan is never in range
        and limits.get("least", float("-inf")) <= value <= limits.get("most", float("inf"))
        and abs(value) != float("inf")
    )
    if not in_range:
        kind = kind.replace("number", f"number ({bounds})", 1).replace("text", " or ".join(limits.get("words", ("text",))))
        raise UserError(f"{key} takes {kind}, not {show(value)}")
