"""All strategies, and which of them the launcher's config requests."""

from halos.distributed.deepspeed import DeepSpeed, DeepSpeed3
from halos.distributed.fsdp2 import FSDP2
from halos.distributed.replicated import Replicated
from halos.distributed.strategy import Strategy

STRATEGIES: tuple[type[Strategy], ...] = (DeepSpeed3, DeepSpeed, FSDP2, Replicated)  # the first that is requested is used


def requested_strategy() -> type[Strategy]:
    """Return the strategy that the launcher's environment variables ask for. Its `check_launch` refuses what it cannot follow."""
    return next(strategy for strategy in STRATEGIES if strategy.is_requested())
