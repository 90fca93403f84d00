"""Reject settings of the reference, and of bounds measured against it, that a loss does not read or that contradict another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from halos.config.overrides import typed_keys
from halos.config.schema import Config, Humanline, Online
from halos.errors import UserError
from halos.reward_kind import RewardKind


class LossTraits(Protocol):
    """The part of a LossSpec that is needed here; importing it would import torch."""

    @property
    def name(self) -> str: ...

    @property
    def needs_reference(self) -> bool: ...

    @property
    def candidates(self) -> int: ...

    @property
    def inputs(self) -> Any: ...

    @property
    def example_type(self) -> Any: ...

    @property
    def on_rollouts(self) -> bool: ...

    @property
    def ratio_level(self) -> str: ...


def check_reference(config: Config, loss: LossTraits, overrides: Sequence[str]) -> None:
    """Raises UserError with the first message."""
    clamped, idle = humanline_complaint(config.humanline, loss), _idle_cache(config, loss, overrides)
    for complaint in (_complain_of_teacher(config, loss), _named(config, loss), clamped, _moving(config, loss), idle):
        if complaint:
            raise UserError(complaint)


def _complain_of_teacher(config: Config, loss: LossTraits) -> str | None:
    if not loss.candidates:
        return None
    if config.online is not None:
        return (
            f"online.loss={loss.name}: it learns from what a teacher says of given completions, and samples have no teacher:"
            " give a loss with a KL to its reference"
        )
    if config.reference.sync_every is not None:
        return f"reference.sync_every={config.reference.sync_every}: the teacher of loss={loss.name} does not move: leave it out"
    return None


def reads_teacher_columns(config: Config, loss: LossTraits) -> bool:
    """Return whether what a teacher says is in the rows, so that the run holds no reference model."""
    return bool(loss.candidates) and config.reference.name_or_path is None


def has_reference(config: Config, loss: LossTraits) -> bool:
    """Return whether a reference model computes, before the first step or at every one."""
    return loss.needs_reference and not reads_teacher_columns(config, loss)


def _named(config: Config, loss: LossTraits) -> str | None:
    if config.reference.name_or_path is None or loss.needs_reference:
        return None
    return (
        f"reference.name_or_path is {config.reference.name_or_path}, but loss={loss.name} uses no reference model:"
        " leave it out, or choose a loss that does"
    )


def _moving(config: Config, loss: LossTraits) -> str | None:
    reference, every = config.reference, f"reference.sync_every={config.reference.sync_every}"
    lora = config.peft.name == "lora"
    if reference.sync_every is None:
        idle = reference.sync_weight != 1 and config.resume is None
        return f"reference.sync_weight={reference.sync_weight:g} has no effect without reference.sync_every" if idle else None
    if not loss.needs_reference:
        return f"{every} moves the reference, and loss={loss.name} uses none: leave it out, or choose a loss that does"
    if loss.on_rollouts and (config.online is None or config.online.steps is None):
        return (
            f"{every}: the reference's log-probs of rollouts are computed once, before the first step: leave it out (between"
            " online rounds, online.reference=last moves it)"
        )
    if lora and reference.name_or_path is not None:
        return (
            f"{every}: the reference becomes the policy, which is an adapter, and reference.name_or_path a model: leave out one"
        )
    if lora and config.peft.init_from is not None and reference.adapter == "off":
        return f"{every} with reference.adapter=off: a reference that moves starts as the policy does: leave one of them out"
    return None


def _idle_cache(config: Config, loss: LossTraits, overrides: Sequence[str]) -> str | None:
    """A cache of what no reference says; `never` holds for such a loss anyway."""
    is_typed = "reference.cache" in typed_keys(overrides)
    if loss.needs_reference or config.reference.cache != "always" or not is_typed or config.resume is not None:
        return None
    return (
        f"reference.cache=always keeps the reference's log-probs, and loss={loss.name} uses no reference model: leave it out, or"
        " choose a loss that does"
    )


def refuse_moving_between_rounds(config: Config, online: Online, loss: LossTraits) -> None:
    """Raises UserError where the reference of an adapter's later rounds would move from the first policy, which is its base."""
    every, lora = config.reference.sync_every, config.peft.name == "lora"
    if lora and every is not None and loss.needs_reference and online.reference != "last" and online.rounds > 1:
        raise UserError(
            f"reference.sync_every={every} (which humanline=on sets) moves the reference from the policy that a round starts"
            f" with, and online.reference={online.reference} keeps it at the first policy: online.reference=last goes with it"
        )


def humanline_complaint(settings: Humanline, loss: LossTraits) -> str | None:
    """Return why a loss does not go with these bounds; None where it does, or where there are none."""
    given = {"low": settings.low, "high": settings.high}
    bounds = [f"humanline.{name}={value:g}" for name, value in given.items() if value is not None]
    if not bounds:
        return None
    if loss.candidates:
        return f"{bounds[0]} bounds log-ratios of tokens, and loss={loss.name} compares whole distributions: humanline=off"
    if not loss.needs_reference or RewardKind.of(loss.inputs.head):
        return f"{bounds[0]} bounds log-ratios to a reference, and loss={loss.name} uses none: humanline=off, or another loss"
    if loss.on_rollouts:
        return f"{bounds[0]}: loss={loss.name} clips its ratios to the policy that sampled by keys of its own: humanline=off"
    if settings.low == settings.high:
        return f"humanline.low and humanline.high are both {settings.low:g}: no token would have a gradient"
    return None
