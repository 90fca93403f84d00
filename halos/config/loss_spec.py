"""LossSpec: a loss that is bound to its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from halos.reward_kind import RewardKind
from halos.types import LossInput, RolloutInput


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A loss with its hyperparameters bound, and what its signature requires of the run."""

    name: str  # last part of its module
    function: Callable[..., Any]  # of an `inputs`[, reference][, statistics][, state]
    inputs: type[LossInput]
    needs_reference: bool
    statistics: Callable[..., Any] | None  # over the global batch, where the loss has a parameter `statistics`
    statistics_inputs: type | None
    examples: Callable[..., Any] | None  # rewrites an example before tokenisation
    example_type: type | None
    settings: dict[str, Any]
    takes_reference: bool = False  # has a parameter `reference`, which is None where the hyperparameters need no reference
    advantages: Callable[..., Any] | None = None  # of a loss on rollouts: computed from a sampled global batch
    adapt: Callable[..., float] | None = None  # returns the KL coefficient for the next global batch
    check_rewards: Callable[..., str | None] | None = None  # of data or of a sampled batch: a complaint, where they do not fit
    start: Mapping[str, float] | None = None  # its state before the first step, where it has a parameter `state`
    update: Callable[..., Mapping[str, float]] | None = None  # returns the state after a step
    adapt_entropy: Callable[..., float] | None = None  # returns the entropy coefficient for the next step
    candidates: int = 0  # ids of which the reference says the log-prob for each token: its likeliest
    token_statistics: tuple[str, ...] = ()  # of its input type, and those that its hyperparameters ask for
    derived: Callable[[Mapping[str, float]], dict[str, float]] | None = None  # of a mixture; else its input type's
    ratio_level: str = "token"  # of a loss on rollouts: its ratio pi / pi_old is of a token, or of a whole completion (sequence)

    @property
    def on_rollouts(self) -> bool:
        return issubclass(self.inputs, RolloutInput)

    @property
    def unneeded(self) -> list[None]:
        """What it and its statistics get in the place of a reference that they take and do not need."""
        return [None] if self.takes_reference and not self.needs_reference else []

    @property
    def reward(self) -> RewardKind | None:
        """The kind of reward model that it trains; None where it trains a policy."""
        return RewardKind.of(self.inputs.head)

    @property
    def has_own_rows(self) -> bool:
        """Whether code of the user's own makes the rows: it may draw them, or make one of several items."""
        return self.inputs.rows.__module__.partition(".")[0] != "halos"

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return metrics that are functions of the means of others."""
        return (self.derived or self.inputs.derived)(means)
