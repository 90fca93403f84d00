"""What a run inside somebody else's process leaves as it was: random number generators, and whether torch is deterministic."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from halos.distributed.environment import DETERMINISTIC


@contextmanager
def restore_generators() -> Iterator[None]:
    """Restore the states of Python's, numpy's and torch's generators, of those that are imported: a run seeds them all, and a
    caller's random search would repeat itself."""
    torch, numpy, state = sys.modules.get("torch"), sys.modules.get("numpy"), random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    torch_state = torch.get_rng_state() if torch else None
    cuda_states = torch.cuda.get_rng_state_all() if torch and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)
        if torch:
            torch.set_rng_state(torch_state)
        if torch and cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def restore_determinism() -> Iterator[None]:
    """Restore what train.deterministic sets; later runs and the caller's own code would be slower, or fail."""
    torch, variables = sys.modules.get("torch"), {name: os.environ.get(name) for name in DETERMINISTIC}
    enabled = torch.are_deterministic_algorithms_enabled() if torch else False
    warns = torch.is_deterministic_algorithms_warn_only_enabled() if torch else False
    fills = torch.utils.deterministic.fill_uninitialized_memory if torch else True  # torch's default
    try:
        yield
    finally:
        for name, value in variables.items():
            if value is not None:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)
        if torch := sys.modules.get("torch"):
            torch.use_deterministic_algorithms(enabled, warn_only=warns)
            torch.utils.deterministic.fill_uninitialized_memory = fills
