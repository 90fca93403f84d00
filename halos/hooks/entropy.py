"""The entropy coefficient of a loss that adapts it to a target: part of a run's state, and passed on to the next online round."""

import json
from pathlib import Path
from typing import Any

from halos import confined
from halos.hooks.base import Hook, Run

NAME = "entropy_coefficient.json"  # in FINAL, next to the weights


class EntropyCoefficient(Hook):
    """Holds the coefficient and the last step's mean entropy; the trainer updates both after each step that is not skipped."""

    def __init__(self, value: float) -> None:
        self.value = self.start = value
        self.entropy: float | None = None  # nats per token; None before the first step

    def applied(self, target: float) -> float:
        """The coefficient that a step uses: 0 unless the last step's entropy was at most `target`."""
        return self.value if self.entropy is not None and self.entropy <= target else 0.0

    def on_save(self, run: Run, path: Path, *, final: bool) -> None:
        if run.main and final:
            (path / NAME).write_text(json.dumps(self.state_dict()) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "start": self.start, "entropy": self.entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the saved value, unless loss.entropy_coefficient was changed since: then the new start counts."""
        self.entropy = state.get("entropy")
        if state.get("start", self.start) == self.start:
            self.value = state.get("value", self.value)


def coefficient_in(final: Path) -> float | None:
    """The coefficient at the end of a run, from its FINAL; None where none was saved."""
    if not (final / NAME).is_file():
        return None
    value = confined.load_object(final / NAME, within=final).get("value")
    return float(value) if isinstance(value, int | float) else None
