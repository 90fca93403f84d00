"""The weight of the KL to the reference, where it follows a target: part of a run's state, and handed on to a later round."""

import json
from pathlib import Path
from typing import Any

from halos import confined
from halos.hooks.base import Hook, Run

NAME = "kl_coefficient.json"  # beside a save's weights: what the next step would have had


class KLCoefficient(Hook):
    """Holds the coefficient; the trainer moves it after each step."""

    def __init__(self, value: float) -> None:
        self.value = self.start = value

    def on_save(self, run: Run, path: Path, *, final: bool) -> None:
        if run.main and final and run.config.loss.get("kl_target") is not None:
            (path / NAME).write_text(json.dumps(self.state_dict()) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """One that has been typed anew since holds: it was changed on purpose."""
        if state.get("start", self.start) == self.start:
            self.value = state.get("value", self.value)


def left_in(final: Path) -> float | None:
    """Where a run has left it, by its FINAL; None where that says nothing."""
    if not (final / NAME).is_file():
        return None
    value = confined.load_object(final / NAME, within=final).get("value")
    return float(value) if isinstance(value, int | float) else None
