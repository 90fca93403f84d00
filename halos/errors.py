"""The one error type for wrong input, as opposed to bugs; messages from libraries' errors; exit statuses of commands."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from halos.redaction import redact, write_redacted_tracebacks

# raised by libraries without being an Exception: panics of pyo3 (tokenizers, safetensors), and torch's sharded loader
BASE_EXCEPTIONS = ("PanicException", "CheckpointException")
LONGEST = 400  # characters of a library's message that ours repeats
# control characters except line ends and tabs, lone surrogates, and bidirectional overrides: a terminal obeys or garbles them
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Wrong input: the message says what was wrong, where, what was given and what would work. Exit status 2."""


class JobsFailedError(Exception):
    """A job of a sweep has failed and reported why; the others ran on. Exit status 1."""


@contextmanager
def user_errors(action: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever a library raises inside into one UserError that starts with `action`.

    Not by exception classes: a parser, a file format or a network client raises whatever its own parts raise. Wrap only calls
    that hand untrusted bytes, or a remote server, to a library.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ not in BASE_EXCEPTIONS:
            raise
        if type(error).__module__.split(".")[0] in ("halos", "__main__"):
            raise
        raise UserError(f"{action}: {first_line_of(error)}{f'; {remedy}' if remedy else ''}") from error


def first_line_of(error: BaseException) -> str:
    """Return the first line of an error's message, shortened; its class if there is no message."""
    lines = [line.strip() for line in redact(str(error)).splitlines() if line.strip()]  # before a secret is cut in two
    bare = isinstance(error, (KeyError, IndexError, TypeError, AttributeError)) and lines
    text = f"{type(error).__name__}: {lines[0]}" if bare else next(iter(lines), type(error).__name__)
    return one_line(text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")


def printable(text: str) -> str:
    """Escape characters with which untrusted text could hide, forge or recolour lines of a terminal or a log."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: object) -> str:
    """Do the same for a name, and escape its line ends too."""
    return printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def command(main: Callable[[], int], *, stopped: str = "") -> int:
    """Run `main` and return the exit status: its own, 2 after a UserError, 130 after Ctrl-C, which prints `stopped`."""
    write_redacted_tracebacks()
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        write_message(error)
        return 2
    except BrokenPipeError:
        return closed_pipe_status()
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped{': ' if stopped else ''}{stopped}\n")
        return 130
    return status


def write_message(error: Exception) -> None:
    """Write the one message of a command that ends: on the terminal, or in the log of a stage or of a sweep's job."""
    sys.stderr.write(f"error: {printable(redact(str(error)))}\n")
    sys.stderr.flush()


def closed_pipe_status() -> int:
    """Return 0 for `command | head`, where the reader has closed the pipe, and discard what is still buffered."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
