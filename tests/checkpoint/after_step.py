"""train.py, interrupted right after a given optimizer step: python after_step.py kill|wait STEP OVERRIDE ...

`kill` is SIGKILL; `wait` prints `waiting` and pauses until its input ends.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from halos.trainers.base import Trainer

action, last = sys.argv[1], int(sys.argv[2])
step = Trainer.step


def interrupted(self, indices):  # type: ignore[no-untyped-def]
    totals = step(self, indices)
    if self.run.step == last and action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif self.run.step == last:
        print("waiting", flush=True)
        sys.stdin.read()
    return totals


Trainer.step = interrupted  # type: ignore[method-assign]
sys.argv = ["train.py", *sys.argv[3:]]
train.main()
