"""Stop requests: signals that ask a run, a stage of an online run or a sweep to save and exit.

For a training run: SIGTERM -> the handler of `StopRequest.listen` -> `Run.stop_requested`, on this rank -> the ranks all-reduce
it with the metrics of the step -> `Run.stop`, on every rank, at the end of this step, or of the next for a signal that arrives
after its all-reduce -> the loop ends, `Checkpointer` saves, and the process exits with STOPPED.
"""

import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

STOPPED = 75  # exit status of a run that a signal stopped: start it again (EX_TEMPFAIL)
SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_SIGNALS = (*SCHEDULER_SIGNALS, signal.SIGINT)
# Sent by the kernel when the launcher dies. A signal of its own, since it arrives once per thread of the launcher, and a second
# Ctrl-C ends a run at once
ORPHANED = signal.SIGUSR2


class StopRequest:
    """Records whether a signal has asked this process to save and exit, and which."""

    def __init__(self) -> None:
        self.reason: str | None = None  # the first signal's name, or what it stands for
        self.count = 0  # signals so far
        self._on_request: Callable[[str], None] | None = None

    def listen(
        self,
        on_request: Callable[[str], None] | None = None,
        *,
        signals: Sequence[int] = STOP_SIGNALS,
        second_interrupt_kills: bool = True,
    ) -> None:
        """Install the handlers. The first signal calls `on_request` with its reason, inside whatever code it interrupts.

        With `second_interrupt_kills` a second Ctrl-C ends the process at once. Other signals may repeat: schedulers and
        launchers send them more than once.
        """
        self._on_request = on_request

        def handle(number: int, _: types.FrameType | None) -> None:
            if self.reason and number == signal.SIGINT and second_interrupt_kills:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._request(signal.Signals(number).name)

        if _in_main_thread():
            for number in signals:
                signal.signal(number, handle)

    def listen_for_launcher_death(self) -> None:
        """Treat ORPHANED as a stop request; the kernel sends it once for each thread of the launcher."""

        def handle(number: int, _: types.FrameType | None) -> None:
            signal.signal(number, signal.SIG_IGN)  # the other threads' copies
            self._request("its launcher has died")

        if _in_main_thread():
            signal.signal(ORPHANED, handle)

    def _request(self, reason: str) -> None:
        self.count += 1
        if self.reason is None:
            self.reason = reason
            if self._on_request is not None:
                self._on_request(reason)


def _in_main_thread() -> bool:
    """Only there may Python set signal handlers: in another thread of a user's program, no signal stops a run."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def restore_signals_and_argv() -> Iterator[None]:
    """Restore signal handlers and sys.argv afterwards: for a run inside somebody else's process."""
    argv, handlers = sys.argv, {}
    if _in_main_thread():
        handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, ORPHANED)}
    try:
        yield
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def exit_on_stop_signal() -> None:
    """Until a run listens itself, exit with STOPPED on a scheduler's signal. A signal that arrived even earlier is delivered
    now, if whoever started this process blocked it (launch/slurm/rank.py)."""

    def handle(number: int, _: types.FrameType | None) -> None:
        os.write(2, f"stopped: {signal.Signals(number).name}, before anything began\n".encode())
        os._exit(STOPPED)

    for number in SCHEDULER_SIGNALS:
        signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SCHEDULER_SIGNALS)
