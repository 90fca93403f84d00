"""The one error that is the user's to mend, as opposed to a defect of ours; and how a command ends."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# what libraries raise past Exception: pyo3's panics, under which tokenizers and safetensors lie, and torch's sharded loader
PAST_EXCEPTION = ("PanicException", "CheckpointException")
LONGEST = 400  # characters of a library's own words that a message repeats
# what a terminal obeys or cannot show: control characters but for ends of lines and tabs, halves of characters, reversed text
UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Wrong input: the message says what was wrong, where, what was given and what would work. Ends in exit status 2."""


class JobsFailedError(Exception):
    """A job of a sweep has failed, and said why; the others went on. Ends in exit status 1."""


@contextmanager
def doing(what: str, remedy: str = "") -> Iterator[None]:
    """Whatever a library raises inside becomes one UserError that says what was being done.

    By the deed and not by classes: a parser, a file format or a network client raises whatever its own parts raise. Put only
    calls into it that hand a stranger's bytes, or a distant server, to a library.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ not in PAST_EXCEPTION:
            raise
        if type(error).__module__.split(".")[0] in ("halos", "__main__"):
            raise
        raise UserError(f"{what}: {words_of(error)}{f'; {remedy}' if remedy else ''}") from error


def words_of(error: BaseException) -> str:
    """The first line of what a library says, short enough to stand in a message; its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    bare = isinstance(error, (KeyError, IndexError, TypeError, AttributeError)) and lines
    text = f"{type(error).__name__}: {lines[0]}" if bare else next(iter(lines), type(error).__name__)
    return one_line(text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")


def printable(text: str) -> str:
    """Text that may hold a stranger's words, for a terminal or a log: what could hide, forge or recolour lines is spelled out."""
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: object) -> str:
    """The same for a name, which has no ends of lines of its own."""
    return printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def command(main: Callable[[], int], *, stopped: str = "") -> int:
    """The exit status of a command: what `main` gives, 2 after the one message of a UserError, 130 after Ctrl-C and `stopped`."""
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
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
