"""Align language models: one loss function, one YAML, one command; checkpoints that resume exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halos.cli.result import Result

__version__ = "0.1.0"


def train(overrides: Sequence[str]) -> Result:
    """A run in this process, as `python train.py` with the same words makes it: `train(["loss=dpo", "model=tiny", ...])`.

    What a signal does, and sys.argv, are afterwards what they were. Raises UserError for wrong input; a signal that stops the
    run ends it with a complete save, and `status` says so.
    """
    from halos.cli.command import one_run  # here: `import halos` is to cost nothing

    return one_run(overrides)
