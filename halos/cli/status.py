"""Exit statuses, and the one message for wrong input."""

from __future__ import annotations

import signal
import time

from halos.distributed.environment import count_from_environment
from halos.distributed.signals import STOP_SIGNALS
from halos.errors import UserError, write_message

FAILED, WRONG_INPUT = 1, 2


def refuse(error: UserError) -> int:
    """Print the message on one rank per host. The others wait, so that the launcher does not kill that rank first."""
    if count_from_environment("LOCAL_RANK", 0):
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # which the launcher sends once the other rank has exited
        time.sleep(2)
    else:
        write_message(error)
    return WRONG_INPUT
