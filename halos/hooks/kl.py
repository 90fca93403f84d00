"""The KL coefficient of a loss that adapts it to a target."""

from halos.hooks.base import Run
from halos.hooks.coefficient import Coefficient


class KLCoefficient(Coefficient):
    """Of the KL in a reward: loss.kl_coefficient at the start."""

    file = "kl_coefficient.json"

    def is_passed_on(self, run: Run) -> bool:
        return run.config.loss.get("kl_target") is not None
