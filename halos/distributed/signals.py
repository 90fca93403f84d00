"""What a signal means before there is anything to save."""

import os
import signal
import types

AGAIN = 75  # the status of a run that a signal stopped: start it again (EX_TEMPFAIL)
STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send
ASKING = (*STOPPING, signal.SIGINT)  # all that ask a run to save and leave


def leave_when_told() -> None:
    """From now until a run listens itself, a signal that asks to stop ends this process with AGAIN. One that came even earlier
    does so now, if whoever started us held it back (launch/slurm/rank.py)."""

    def told(number: int, _: types.FrameType | None) -> None:
        os.write(2, f"stopped: {signal.Signals(number).name}, before anything began\n".encode())
        os._exit(AGAIN)

    for number in STOPPING:
        signal.signal(number, told)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
