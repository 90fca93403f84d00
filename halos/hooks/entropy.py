"""The entropy coefficient of a loss that adapts it to a target."""

from typing import Any

from halos.hooks.coefficient import Coefficient


class EntropyCoefficient(Coefficient):
    """Of the entropy bonus: loss.entropy_coefficient at the start. It also holds the last step's mean entropy."""

    file = "entropy_coefficient.json"

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.entropy: float | None = None  # nats per token; None before the first step

    def applied(self, target: float) -> float:
        """The coefficient that a step uses: 0 unless the last step's entropy was at most `target`."""
        return self.value if self.entropy is not None and self.entropy <= target else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "entropy": self.entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.entropy = state.get("entropy")
        super().load_state_dict(state)
