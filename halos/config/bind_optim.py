"""Bind the optimizer and the schedule of a configuration to the signatures of their `_target_`.

Neither a schedule nor the keys that all optimizers share need torch; only an optimizer's own module imports it.
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

EXTRA_ARGUMENTS = (
    "hidden",
)  # passed to an optimizer besides its parameter groups, where its signature has a parameter of that name
MAX_STEPS_TRIED = 10**5  # of a schedule, before a run begins; a longer one is sampled at as many steps


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """An optimizer with its keys bound, and the settings that decide its parameter groups."""

    name: str
    make: Callable[..., Any]  # takes parameter groups, and `extra_arguments` by name
    extra_arguments: tuple[str, ...]  # those of EXTRA_ARGUMENTS that it takes
    lr: float
    weight_decay: float
    loraplus_lr_ratio: float | None
    lr_by_name: Mapping[str, float]
    settings: Mapping[str, Any]  # its own keys


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """A learning-rate schedule with its keys bound."""

    name: str
    multiplier: Callable[[int, int], float]  # of the step, counted from 0, and the total number of steps
    settings: Mapping[str, Any]

    def check_range(self, total: int) -> None:
        """Raises UserError where the multiplier of any of `total` steps is no number from 0 up."""
        for step in range(0, total, -(-total // MAX_STEPS_TRIED)):
            self._at(step, total)

    def _at(self, step: int, total: int) -> float:
        try:
            value = self.multiplier(step, total)
        except Exception as error:  # user code may raise anything
            raise UserError(f"schedule {self.name} fails at step {step} of {total}: {type(error).__name__}: {error}") from error
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(
                f"schedule {self.name} gives {value!r} at step {step} of {total}: it must be a number from 0 up, which"
                " multiplies the learning rate of each parameter group"
            )
        return value

    def same_before(self, step: int, totals: Sequence[int]) -> bool:
        """Return whether runs of these total numbers of steps share the learning rates of all steps before `step`."""
        end = min(step, *totals)
        stride = max(1, end // MAX_STEPS_TRIED)
        try:
            return all(len({self._at(each, total) for total in totals}) == 1 for each in range(end - 1, -1, -stride))
        except UserError:  # it takes no run of one of these lengths
            return False


def bind_schedule(settings: Mapping[str, Any], plugins: Sequence[str]) -> ScheduleSpec:
    """Bind the schedule of the node `schedule`. Raises UserError for keys and values that it does not take."""
    function, _ = load_target(settings, "schedule", plugins, example="halos.schedules.cosine")
    step_and_total = positional(function)[:2] if callable(function) else []
    if len(step_and_total) < 2:
        raise UserError(
            f"schedule._target_: {settings['_target_']} is no schedule: a schedule is a function of the step and the total number"
            " of steps, (step, total), then its keys"
        )
    names, hints = parameters_after(function, step_and_total), hints_of(function)
    legal = {name: hints.get(name, Any) for name in names}
    values = fit_all({**_pick(defaults(function), names), **settings}, legal, "schedule", function.__name__)
    return ScheduleSpec(function.__name__, bind(function, values, names), values)


def shared_keys() -> dict[str, Any]:
    """Return the keys that every optimizer has, as annotations: key -> type and range, from the schema."""
    hints = get_type_hints(Optim)
    return {each.name: Annotated[hints[each.name], Range(**each.metadata["limits"])] for each in fields(Optim)}


def fit_shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node `optim` with the shared keys converted to their types. Raises UserError for a value of another type."""
    legal = {name: annotation for name, annotation in shared_keys().items() if name in settings}
    return {**settings, **{name: fit_one(settings[name], annotation, f"optim.{name}") for name, annotation in legal.items()}}


def bind_optimizer(settings: Mapping[str, Any], plugins: Sequence[str]) -> OptimizerSpec:
    """Bind the optimizer of the node `optim`. Raises UserError for keys and values that it does not take."""
    target, module = load_target(settings, "optim", plugins, example="halos.optimizers.standard.adamw")
    groups = positional(target)[:1] if callable(target) else []
    if not groups or not (inspect.isclass(target) or inspect.isfunction(target)):
        raise UserError(
            f"optim._target_: {settings['_target_']} is no optimizer: that is a function or class of parameter groups,"
            " (params, lr, ...), whose other parameters are its keys"
        )
    name, hints = target.__name__, hints_of(target)
    names = parameters_after(target, [*groups, *EXTRA_ARGUMENTS])
    shared = shared_keys()
    own = {key: hints.get(key, Any) for key in names if key not in shared}
    values = fit_all({**_pick(defaults(target), own), **settings}, {**shared, **own}, "optim", name)
    check = vars(module).get("check")
    if complaint := bind(check, values)() if check else None:
        raise UserError(f"optim {name}: {complaint}")
    extra_arguments = tuple(key for key in EXTRA_ARGUMENTS if key in parameters_after(target, groups))
    return OptimizerSpec(
        name=name, make=partial(target, **_pick(values, names)), extra_arguments=extra_arguments, lr=values["lr"],
        weight_decay=values["weight_decay"],
        loraplus_lr_ratio=values["loraplus_lr_ratio"], lr_by_name=values["lr_by_name"], settings=_pick(values, own),
    )  # fmt: skip


def _pick(values: Mapping[str, Any], names: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
