"""The state of a loss that has one: named numbers, saved in every checkpoint, that change once a step."""

import logging
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from halos.errors import UserError
from halos.hooks.base import Hook

log = logging.getLogger(__name__)

LOSS_STATE = "loss_state"  # the hook's name

Update = Callable[[Mapping[str, float], Mapping[str, tuple[float, float]]], Mapping[str, float]]


class LossState(Hook):
    """Holds the numbers; the trainer calls `update` after each step that is not skipped."""

    def __init__(self, loss: str, start: Mapping[str, float], update: Update) -> None:
        self.loss, self._update = loss, update
        self.values = dict(start)

    def update(self, totals: Mapping[str, tuple[float, float]]) -> None:
        """Take the state after a step whose metrics have these totals and counts over the global batch.

        Raises UserError where the loss returns other names than it started with, or no numbers.
        """
        after = self._update(self.values, totals)
        if not isinstance(after, Mapping) or after.keys() != self.values.keys():
            names = ", ".join(after) if isinstance(after, Mapping) else type(after).__name__
            raise UserError(f"update() of the loss {self.loss} returns {names}: its state is {', '.join(self.values)}")
        if wrong := [name for name, value in after.items() if not isinstance(value, Real)]:
            raise UserError(f"update() of the loss {self.loss} returns {after[wrong[0]]!r} as {wrong[0]}: return a number")
        self.values = {name: float(value) for name, value in after.items()}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the numbers of a checkpoint. Those of another loss, which a resume was allowed to change, are of no use."""
        if state.keys() != self.values.keys():
            log.warning("the checkpoint has no state of the loss %s: it starts anew", self.loss)
            return
        self.values = {name: float(value) for name, value in state.items()}
