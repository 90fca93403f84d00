"""train.py, killed by SIGKILL right after a given optimizer step: python kill_after_step.py STEP OVERRIDE ..."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from halos.trainers.base import Trainer

doomed = int(sys.argv[1])
step = Trainer.step


def step_and_die(self, indices):  # type: ignore[no-untyped-def]
    totals = step(self, indices)
    if self.run.step == doomed:
        os.kill(os.getpid(), signal.SIGKILL)
    return totals


Trainer.step = step_and_die  # type: ignore[method-assign]
sys.argv = ["train.py", *sys.argv[2:]]
train.main()
