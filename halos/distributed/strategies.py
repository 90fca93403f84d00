"""Every engine, and which of them the launcher's config asks for."""

from halos.distributed.deepspeed import DeepSpeed, DeepSpeed3
from halos.distributed.fsdp2 import FSDP2
from halos.distributed.replicated import Replicated
from halos.distributed.strategy import Strategy

ENGINES: tuple[type[Strategy], ...] = (DeepSpeed3, DeepSpeed, FSDP2, Replicated)  # the first that is asked for


def asked() -> type[Strategy]:
    """Of this process's environment, which the launcher has set and `launch.accelerator` has checked."""
    return next(engine for engine in ENGINES if engine.is_asked())
