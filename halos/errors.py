"""The one error that is the user's to mend, as opposed to a defect of ours; and how a command ends."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Wrong input: the message says what was wrong, where, what was given and what would work. Ends in exit status 2."""


class JobsFailedError(Exception):
    """A job of a sweep has failed, and said why; the others went on. Ends in exit status 1."""


def command(main: Callable[[], int], *, stopped: str = "") -> int:
    """The exit status of a command: what `main` gives, 2 after the one message of a UserError, 130 after Ctrl-C and `stopped`."""
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except BrokenPipeError:
        return read_enough()
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped{': ' if stopped else ''}{stopped}\n")
        return 130
    return status


def read_enough() -> int:
    """Exit status 0 for `command | head`: whoever reads our output has closed it, and what is still buffered goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
