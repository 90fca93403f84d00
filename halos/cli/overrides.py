"""Overrides as Hydra's parser reads them, and the combinations of a sweep's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException

from halos.config.overrides import Choices, Override, unreadable
from halos.config.suggest import kind_of
from halos.errors import UserError


def parse(text: str, choices: Choices) -> Override:
    """One override. A sweep's values are as they would be typed; an interval has none. Raises UserError for what is none."""
    try:
        override = OverridesParser.create().parse_override(text)
        sweep, given = override.is_sweep_override(), override.value()
        values: tuple[Any, ...] = ()
        if isinstance(given, Glob):
            values = tuple(given.filter(list(choices.get(override.key_or_group, ()))))
        elif sweep and not override.is_interval_sweep():
            values = tuple(override.sweep_string_iterator())
        elif not sweep and override.value_type is not None:
            values = (given,)
    except HydraException as error:
        raise UserError(unreadable(text, str(error).strip().splitlines()[-1])) from error
    sign = text[: len(text) - len(text.lstrip("+~"))]
    return Override(sign, override.key_or_group, override.package, text.partition("=")[2], values, sweep)


def countable(typed: Sequence[Override]) -> list[Override]:
    """All but an interval, which has no values that could be tried: its key stays at its default."""
    return [one for one in typed if one.values or not one.is_sweep]


def first_values(typed: Sequence[Override]) -> list[str]:
    return [_each_value(one)[0] for one in countable(typed)]


def all_combinations(typed: Sequence[Override]) -> list[list[str]]:
    return [list(overrides) for overrides in product(*map(_each_value, countable(typed)))]


def one_by_one(typed: Sequence[Override]) -> list[list[str]]:
    """The first values together, then every other one in the place of its first."""
    first = first_values(typed)
    others = [[*first[:i], way, *first[i + 1 :]] for i, one in enumerate(countable(typed)) for way in _each_value(one)[1:]]
    return [first, *others]


def _each_value(one: Override) -> list[str]:
    """What is typed, once for each value of a sweep."""
    return [f"{one.sign}{one.key}={value}" for value in one.values] if one.is_sweep else [one.text]


def repeatable(one: Override) -> Override:
    """`+hooks.mine=` may be typed again at every resume."""
    return replace(one, sign="++") if one.sign == "+" and kind_of(one.key) == "free" else one
