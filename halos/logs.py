"""Logging: rank 0 logs to the terminal and train.log; other ranks to a file each, and only warnings to the terminal."""

import logging
import os
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Self

import transformers
from tqdm import tqdm

from halos import confined
from halos.errors import printable
from halos.redaction import RedactingFormatter


class PrintableFormatter(RedactingFormatter):
    """Escapes control characters too: messages may contain file names from untrusted data."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class TqdmHandler(logging.Handler):
    """Writes lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=None)


class RunLogHandler(logging.FileHandler):
    """A log file in the run directory. When the disk is full its lines are lost, and the terminal says so once."""

    _lost = False

    def _open(self) -> TextIOWrapper:
        return os.fdopen(confined.open_to_append(Path(self.baseFilename)), "a", encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)
        elif not self._lost:
            self._lost = True
            tqdm.write(f"{self.baseFilename} cannot be written ({sys.exception()}): log lines are lost from here on", sys.stderr)


class Recorded(logging.Handler):
    """Keeps the lines that are logged while it is open (`with Recorded() as lines`), as the terminal shows them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(PrintableFormatter("%(message)s"))
        self._lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append((record.levelname, self.format(record)))

    def lines(self) -> tuple[tuple[str, str], ...]:
        """Return the level and the text of each line so far."""
        return tuple(self._lines)

    def __enter__(self) -> Self:
        logging.getLogger("halos").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("halos").removeHandler(self)


def configure_logging(main: bool) -> None:
    """Log to the terminal: from INFO on rank 0 (`main`), from WARNING elsewhere. The only place that sets up logging."""
    logger = logging.getLogger("halos")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO)
    console = TqdmHandler(logging.INFO if main else logging.WARNING)
    console.setFormatter(PrintableFormatter("%(message)s"))
    logger.addHandler(console)
    silence_libraries()


def silence_libraries() -> None:
    """Turn off progress bars and warnings of the libraries below, on which a user of halos cannot act."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def add_log_file(path: Path) -> None:
    """Log to a file as well, created with its first line. Raises UserError where `path` is a link or not a regular file."""
    if os.path.lexists(path):
        os.close(confined.open_to_append(path))
    file = RunLogHandler(path, delay=True)
    file.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("halos").addHandler(file)


def log_traceback(message: str, error: BaseException) -> None:
    """Write a traceback to the log files only: the terminal gets one sentence."""
    logger = logging.getLogger("halos")
    info = (type(error), error, error.__traceback__)
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, message, (), info)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
