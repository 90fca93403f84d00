"""Humanline, a modifier of any loss with a reference, in the proof of such a loss: its bounds, its worked numbers and mutants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from halos.certify import worked
from halos.certify.mutants import mutants, survivors
from halos.certify.worked import Namespace, Ragged
from halos.config.loss_spec import LossSpec
from halos.config.ranges import check_ranges
from halos.config.reference_checks import humanline_complaint
from halos.config.schema import Humanline as Bounds
from halos.config.suggest import nearest
from halos.config.values import show
from halos.errors import UserError
from halos.trainers import humanline
from halos.trainers.humanline import Humanline
from halos.types import TokenLogps

MODIFIER = "humanline"
CHOICES = {"on": True, True: True, "off": False, False: False, None: False}  # YAML reads `on` as true


def split(overrides: Mapping[str, Any], on: Mapping[str, Any]) -> tuple[dict[str, Any], Bounds]:
    """Separate the keys of the loss from `humanline`, `humanline.low` and `humanline.high`; `on` are the bounds of humanline=on.

    Raises UserError for values that these do not take.
    """
    keys = {key: value for key, value in overrides.items() if key.partition(".")[0] != MODIFIER}
    given = {key.partition(".")[2]: value for key, value in overrides.items() if key not in keys}
    choice = given.pop("", None)
    if not isinstance(choice, str | bool | None) or choice not in CHOICES:
        raise UserError(f"humanline has no choice {show(choice)}; choices: on, off")
    if wrong := [name for name in given if name not in ("low", "high")]:
        meant = f"; did you mean humanline.{near}?" if (near := nearest(wrong[0], ["low", "high"])) else ""
        raise UserError(f"there is no key 'humanline.{wrong[0]}'{meant or ': humanline has low and high'}")
    bounds = {"low": None, "high": None, **(on if CHOICES[choice] else {}), **given}
    check_ranges({MODIFIER: bounds})
    return keys, Bounds(**bounds)


def modifier_of(bounds: Bounds, spec: LossSpec) -> Humanline | None:
    """The modifier with these bounds. Raises UserError for a loss that a run would refuse it for."""
    if (complaint := humanline_complaint(bounds, spec)) is not None:
        raise UserError(complaint)
    return Humanline.of(bounds)


def problem(namespace: Namespace, example: Mapping[str, Any]) -> str | None:
    """The first number in which the clamp differs from a worked example of it; None where it has them all."""
    leaves = Ragged()
    policy = worked.built(TokenLogps, example["policy"], leaves)
    values, share = namespace["clamp"](policy, worked.built(TokenLogps, example["reference"]), **example["keys"])
    return worked.first_difference(_results(example, values, share, leaves))


def surviving(examples: Sequence[Mapping[str, Any]]) -> tuple[int, list[tuple[int, str]]]:
    """How many mutants the clamp has, and line and text of those that no worked number tells from it."""
    every = list(mutants(humanline, "clamp"))
    return len(every), survivors(every, problem, examples)


def _results(example: Mapping[str, Any], policy: TokenLogps, share: Any, leaves: Ragged) -> Iterator[tuple[str, Any, Any]]:
    yield "values", example["values"], worked.as_ragged(policy.values, example["values"])
    yield from worked.gradients(example, policy.values[policy.mask].sum(), leaves)
    yield from worked.metrics(example, {"humanline/clamped": share})
