"""What a signal means before there is anything to save."""

import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN = 75  # the status of a run that a signal stopped: start it again (EX_TEMPFAIL)
STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send
ASKING = (*STOPPING, signal.SIGINT)  # all that ask a run to save and leave
# What the kernel sends when the launcher dies. A signal of its own, since it comes once for every thread that the launcher had,
# and of those that people send the second one ends a run at once
ORPHANED = signal.SIGUSR2


@contextmanager
def as_before() -> Iterator[None]:
    """For a run within somebody's process: what signals do, and how the process was called, is afterwards as it was."""
    words, main = sys.argv, threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (*ASKING, ORPHANED)} if main else {}
    try:
        yield
    finally:
        sys.argv = words
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def leave_when_told() -> None:
    """From now until a run listens itself, a signal that asks to stop ends this process with AGAIN. One that came even earlier
    does so now, if whoever started us held it back (launch/slurm/rank.py)."""

    def told(number: int, _: types.FrameType | None) -> None:
        os.write(2, f"stopped: {signal.Signals(number).name}, before anything began\n".encode())
        os._exit(AGAIN)

    for number in STOPPING:
        signal.signal(number, told)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
