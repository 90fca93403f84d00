"""Align language models: one loss function, one YAML, one command; checkpoints that resume exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halos.cli.result import Result

__version__ = "0.1.0"


def train(overrides: Sequence[str]) -> Result:
    """Train in this process, as `python train.py` does with the same overrides: `train(["loss=dpo", "model=tiny", ...])`.

    Restores signal handlers, sys.argv and random number generators afterwards. Raises UserError for wrong input; a stop signal
    ends the run with a checkpoint, unless it arrives before the first step, and `status` is "stopped". In another thread than
    the main one no signal reaches it.
    """
    from halos.cli.command import train as train_here  # here, so that `import halos` costs nothing

    return train_here(overrides)
