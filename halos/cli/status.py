"""How a command ends: its exit status, and the one message that wrong input gets."""

from __future__ import annotations

import signal
import sys
import time

from halos.config.secrets import redact
from halos.distributed.environment import count_from_environment
from halos.distributed.signals import STOP_SIGNALS
from halos.errors import UserError, printable

FAILED, WRONG_INPUT = 1, 2


def refuse(error: UserError) -> int:
    """One message a host. The other ranks wait, so that the launcher does not end the one that speaks before it has."""
    if count_from_environment("LOCAL_RANK", 0):
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # from the launcher, once the other has left
        time.sleep(2)
    else:
        print(f"error: {printable(redact(str(error)))}", file=sys.stderr, flush=True)
    return WRONG_INPUT
