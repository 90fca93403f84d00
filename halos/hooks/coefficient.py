"""A coefficient that a loss adapts to a target: part of a run's state, and passed on to the next online round."""

import json
from pathlib import Path
from typing import Any, ClassVar

from halos import confined
from halos.hooks.base import Hook, Run


class Coefficient(Hook):
    """Holds the coefficient; the trainer updates it after each step that is not skipped."""

    file: ClassVar[str]  # in FINAL, next to the weights: the coefficient that the next step would use

    def __init__(self, value: float) -> None:
        self.value = self.start = value

    def is_passed_on(self, run: Run) -> bool:
        return True

    def on_save(self, run: Run, path: Path, *, final: bool) -> None:
        if run.main and final and self.is_passed_on(run):
            (path / self.file).write_text(json.dumps(self.state_dict()) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the saved value, unless the key that it starts from was changed since: then the new start counts."""
        if state.get("start", self.start) == self.start:
            self.value = state.get("value", self.value)

    @classmethod
    def value_in(cls, final: Path) -> float | None:
        """The coefficient at the end of a run, from its FINAL; None where none was saved."""
        if not (final / cls.file).is_file():
            return None
        value = confined.load_object(final / cls.file, within=final).get("value")
        return float(value) if isinstance(value, int | float) else None
