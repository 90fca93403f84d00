"""Parse overrides with Hydra's parser, and combine a sweep's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException

from halos.config.overrides import Choices, Override, unreadable
from halos.config.suggest import kind_of, schema_keys
from halos.errors import UserError


def parse(text: str, choices: Choices) -> Override:
    """Parse one override. A sweep's values are kept as text; an interval has none. Raises UserError if it is not an override.

    A number for a key that takes text is quoted, since Hydra reads 12e4567, a commit, as infinity.
    """
    try:
        override = OverridesParser.create().parse_override(text)
        sweep, value = override.is_sweep_override(), override.value()
        values: tuple[Any, ...] = ()
        if isinstance(value, Glob):
            values = tuple(value.filter(list(choices.get(override.key_or_group, ()))))
        elif sweep and not override.is_interval_sweep():
            values = tuple(override.sweep_string_iterator())
        elif not sweep and override.value_type is not None:
            values = (value,)
    except HydraException as error:
        raise UserError(unreadable(text, str(error).strip().splitlines()[-1])) from error
    sign = text[: len(text) - len(text.lstrip("+~"))]
    given, key = text.partition("=")[2], override.key_or_group
    takes_text = schema_keys().get(key) in (str, str | None) and not (key == "resume" and isinstance(value, bool))
    if takes_text and not sweep and isinstance(value, bool | int | float):
        given, values = f"'{given.strip()}'", (given.strip(),)
    elif takes_text and sweep and not set(given) & set("()[]{}'\""):
        values = tuple(map(_quoted, given.split(",")))
        given = ",".join(values)
    return Override(sign, key, override.package, given, values, sweep)


def _quoted(value: str) -> str:
    """Quote one value of a sweep where Hydra would read it as a number."""
    read = OverridesParser.create().parse_override(f"x={value.strip()}").value()
    return f"'{value.strip()}'" if isinstance(read, bool | int | float) else value.strip()


def enumerable(parsed: Sequence[Override]) -> list[Override]:
    """Return all overrides but intervals, whose values cannot be enumerated: their keys stay at the defaults."""
    return [one for one in parsed if one.values or not one.is_sweep]


def first_values(parsed: Sequence[Override]) -> list[str]:
    """Return each override as text, with the first of its values."""
    return [_each_value(one)[0] for one in enumerable(parsed)]


def all_combinations(parsed: Sequence[Override]) -> list[list[str]]:
    """Return the overrides of each job of a grid."""
    return [list(overrides) for overrides in product(*map(_each_value, enumerable(parsed)))]


def one_by_one(parsed: Sequence[Override]) -> list[list[str]]:
    """Return a job with all first values, and for every other value a job in which it replaces the first."""
    first = first_values(parsed)
    others = [[*first[:i], text, *first[i + 1 :]] for i, one in enumerate(enumerable(parsed)) for text in _each_value(one)[1:]]
    return [first, *others]


def _each_value(one: Override) -> list[str]:
    """Return the override as text, once for each value of a sweep."""
    return [f"{one.sign}{one.key}={value}" for value in one.values] if one.is_sweep else [one.text]


def repeatable(one: Override) -> Override:
    """Turn `+hooks.mine=` into `++hooks.mine=`, so that every resume may add it again."""
    return replace(one, sign="++") if one.sign == "+" and kind_of(one.key) == "free" else one
