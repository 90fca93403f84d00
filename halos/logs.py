"""Who speaks: the first process to the terminal and train.log; each other one to its own file, and aloud when it fails."""

import logging
import warnings
from pathlib import Path

import transformers
from tqdm import tqdm


class AboveTheBar(logging.Handler):
    """Writes lines without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=None)


def speak(main: bool) -> None:
    """Set logging up, in the one place where it is."""
    logger = logging.getLogger("halos")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO)
    console = AboveTheBar(logging.INFO if main else logging.WARNING)
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def write_to(path: Path) -> None:
    """Keep what is said in a file too, which is made when there is something to say."""
    file = logging.FileHandler(path, delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("halos").addHandler(file)
