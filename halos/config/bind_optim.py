"""The optimizer and the schedule of the configuration, against the signatures of what they name.

A schedule is bound without torch, and so are the keys that every optimizer has; an optimizer's own module brings it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any, get_type_hints

from halos.config.schema import Optim
from halos.config.signature import bind, defaults, fit_all, fit_one, hints_of, load_target, parameters_after, positional
from halos.errors import UserError
from halos.ranges import Range

EXTRA_ARGUMENTS = ("hidden",)  # what an optimizer is given besides its parameter groups, where its signature asks for it by name
MAX_STEPS_TRIED = 10**5  # steps of a schedule that are looked at before a run begins; of more, as many spread over all


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """An optimizer with its keys bound, and what decides how the parameters are grouped for it."""

    name: str
    make: Callable[..., Any]  # from parameter groups, and what it asks for
    asks: tuple[str, ...]  # of GIVEN
    lr: float
    weight_decay: float
    loraplus_lr_ratio: float | None
    lr_by_name: Mapping[str, float]
    settings: Mapping[str, Any]  # its own keys


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """A schedule with its keys bound."""

    name: str
    multiplier: Callable[[int, int], float]  # of the step, counted from 0, and the number of all steps
    settings: Mapping[str, Any]

    def refuse_odd(self, total: int) -> None:
        """Raises UserError where a step of `total` has no rate."""
        for step in range(0, total, -(-total // MAX_STEPS_TRIED)):
            self._at(step, total)

    def _at(self, step: int, total: int) -> float:
        try:
            value = self.multiplier(step, total)
        except Exception as error:  # whatever a function of the user's raises
            raise UserError(f"schedule {self.name} fails at step {step} of {total}: {type(error).__name__}: {error}") from error
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(
                f"schedule {self.name} gives {value!r} at step {step} of {total}: it must be a number from 0 up, which"
                " multiplies each group's rate"
            )
        return value

    def agrees(self, one: int, other: int, *, start: int) -> bool:
        """Whether each step from `start` on has the same rate in runs of `one` and of `other` steps, as far as both go."""
        end = min(one, other)
        return all(
            self._at(step, one) == self._at(step, other) for step in range(start, end, max(1, (end - start) // MAX_STEPS_TRIED))
        )

    def is_spread(self, start: int = 0) -> bool:
        """Whether the rate of any step from `start` on depends on how many there are in all: tried on a short and a long run."""
        try:
            return not self.agrees(2 * (start + 1000), 20 * (start + 1000), start=start)
        except UserError:  # it is for runs of other lengths
            return True


def bind_schedule(settings: Mapping[str, Any], plugins: Sequence[str]) -> ScheduleSpec:
    """The schedule that the node `schedule` names. Raises UserError for whatever it does not take."""
    function, _ = load_target(settings, "schedule", plugins, example="halos.schedules.cosine")
    given = positional(function)[:2] if callable(function) else []
    if len(given) < 2:
        raise UserError(
            f"schedule._target_: {settings['_target_']} is no schedule: a schedule is a function of the step and the number of"
            " all steps, (step, total), then its keys"
        )
    names, hints = parameters_after(function, given), hints_of(function)
    legal = {name: hints.get(name, Any) for name in names}
    values = fit_all({**_pick(defaults(function), names), **settings}, legal, "schedule", function.__name__)
    return ScheduleSpec(function.__name__, bind(function, values, names), values)


def shared_keys() -> dict[str, Any]:
    """What every optimizer has, as the schema has it: key -> annotation."""
    hints = get_type_hints(Optim)
    return {each.name: Annotated[hints[each.name], Range(**each.metadata["limits"])] for each in fields(Optim)}


def fit_shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The node `optim` with those in their types. Raises UserError for one that is missing or no such value."""
    legal = {name: annotation for name, annotation in shared_keys().items() if name in settings}
    return {**settings, **{name: fit_one(settings[name], annotation, f"optim.{name}") for name, annotation in legal.items()}}


def bind_optimizer(settings: Mapping[str, Any], plugins: Sequence[str]) -> OptimizerSpec:
    """The optimizer that the node `optim` names. Raises UserError for whatever it does not take."""
    target, module = load_target(settings, "optim", plugins, example="halos.optimizers.standard.adamw")
    given = positional(target)[:1] if callable(target) else []
    if not given or not (inspect.isclass(target) or inspect.isfunction(target)):
        raise UserError(
            f"optim._target_: {settings['_target_']} is no optimizer: an optimizer is a function or class of parameter groups,"
            " (params, lr, ...), whose other parameters are its keys"
        )
    name, hints = target.__name__, hints_of(target)
    names = parameters_after(target, [*given, *EXTRA_ARGUMENTS])
    shared = shared_keys()
    own = {key: hints.get(key, Any) for key in names if key not in shared}
    values = fit_all({**_pick(defaults(target), own), **settings}, {**shared, **own}, "optim", name)
    check = vars(module).get("check")
    if complaint := bind(check, values)() if check else None:
        raise UserError(f"optim {name}: {complaint}")
    asks = tuple(key for key in EXTRA_ARGUMENTS if key in parameters_after(target, given))
    return OptimizerSpec(
        name=name, make=partial(target, **_pick(values, names)), asks=asks, lr=values["lr"], weight_decay=values["weight_decay"],
        loraplus_lr_ratio=values["loraplus_lr_ratio"], lr_by_name=values["lr_by_name"], settings=_pick(values, own),
    )  # fmt: skip


def _pick(values: Mapping[str, Any], names: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
