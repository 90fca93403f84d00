"""Who speaks: the first process to the terminal and train.log; each other one to its own file, and aloud when it fails."""

import logging
import os
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path

import transformers
from tqdm import tqdm

from halos import confined
from halos.errors import printable


class Printable(logging.Formatter):
    """What is said may hold names of a stranger's files."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class AboveTheBar(logging.Handler):
    """Writes lines without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=None)


class Kept(logging.FileHandler):
    """A log file of the run directory. On a full disk what was to be kept is lost, and that is said once, on the terminal."""

    _lost = False

    def _open(self) -> TextIOWrapper:
        return os.fdopen(confined.open_to_append(Path(self.baseFilename)), "a", encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)
        elif not self._lost:
            self._lost = True
            tqdm.write(
                f"{self.baseFilename} cannot be written ({sys.exception()}): what is said is lost from here on", sys.stderr
            )


def speak(main: bool) -> None:
    """Set logging up, in the one place where it is."""
    logger = logging.getLogger("halos")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO)
    console = AboveTheBar(logging.INFO if main else logging.WARNING)
    console.setFormatter(Printable("%(message)s"))
    logger.addHandler(console)
    hush_libraries()


def hush_libraries() -> None:
    """Neither bars nor warnings of what lies below: nobody who runs halos can heed them."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def write_to(path: Path) -> None:
    """Keep what is said in a file too, which is made when there is something to say. Raises UserError where what stands there
    is a link, or no file."""
    if os.path.lexists(path):
        os.close(confined.open_to_append(path))
    file = Kept(path, delay=True)
    file.setFormatter(Printable("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("halos").addHandler(file)


def trace(message: str, error: BaseException) -> None:
    """Keep a traceback in the file alone: who reads the terminal is told in a sentence."""
    logger = logging.getLogger("halos")
    info = (type(error), error, error.__traceback__)
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, message, (), info)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
