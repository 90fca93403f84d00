"""train.py, pausing after a given optimizer step until its input ends: python wait_after_step.py STEP OVERRIDE ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from halos.trainers.base import Trainer

waits = int(sys.argv[1])
step = Trainer.step


def step_and_wait(self, indices):  # type: ignore[no-untyped-def]
    totals = step(self, indices)
    if self.run.step == waits:
        print("waiting", flush=True)
        sys.stdin.read()
    return totals


Trainer.step = step_and_wait  # type: ignore[method-assign]
sys.argv = ["train.py", *sys.argv[2:]]
train.main()
