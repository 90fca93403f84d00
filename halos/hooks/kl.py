"""The weight of the KL to the reference, where it follows a target: part of a run's state."""

from typing import Any

from halos.hooks.base import Hook


class KLCoefficient(Hook):
    """Holds the coefficient; the trainer moves it after each step."""

    def __init__(self, value: float) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state.get("value", self.value)
