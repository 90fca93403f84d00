"""What a signal means: a request to save and leave, whatever it finds this process at."""

import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

AGAIN = 75  # the status of a run that a signal stopped: start it again (EX_TEMPFAIL)
STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send
ASKING = (*STOPPING, signal.SIGINT)  # all that ask a run to save and leave
# What the kernel sends when the launcher dies. A signal of its own, since it comes once for every thread that the launcher had,
# and of those that people send the second one ends a run at once
ORPHANED = signal.SIGUSR2


class StopRequest:
    """What signals have asked of this process: to save what it does, and to leave. Of runs, stages and sweeps alike."""

    def __init__(self) -> None:
        self.reason: str | None = None  # the first signal's name, or what it stands for
        self.count = 0  # signals so far
        self._hear: Callable[[str], None] | None = None

    def listen(
        self, hear: Callable[[str], None] | None = None, *, numbers: Sequence[int] = ASKING, second_ends: bool = True
    ) -> None:
        """From now on. The first signal calls `hear` with its reason, within whatever it interrupts. A second Ctrl-C ends the
        process at once, where `second_ends`; of the others more may come, since schedulers and launchers repeat themselves."""
        self._hear = hear

        def ask(number: int, _: types.FrameType | None) -> None:
            if self.reason and number == signal.SIGINT and second_ends:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._ask(signal.Signals(number).name)

        for number in numbers:
            signal.signal(number, ask)

    def listen_for_death(self) -> None:
        """Of the launcher, of which the kernel tells each of its threads' children."""

        def orphaned(number: int, _: types.FrameType | None) -> None:
            signal.signal(number, signal.SIG_IGN)  # the rest of them
            self._ask("its launcher has died")

        signal.signal(ORPHANED, orphaned)

    def _ask(self, reason: str) -> None:
        self.count += 1
        if self.reason is None:
            self.reason = reason
            if self._hear is not None:
                self._hear(reason)


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
