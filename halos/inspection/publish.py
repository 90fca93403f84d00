"""Writes the page of a dry run into the directory that the run would use."""

import logging

from transformers import PreTrainedTokenizerBase

from halos.confined import write_whole
from halos.errors import UserError
from halos.inspection import page
from halos.inspection.facts import Fact, Facts
from halos.rundir import DRY_RUN, RunDir
from halos.versions import versions

log = logging.getLogger(__name__)


def save(facts: Facts, directory: RunDir) -> None:
    """Write the page, and log its path. Raises UserError where the directory cannot be written, as the run would."""
    path = directory.path / DRY_RUN
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page.written(facts))
    except OSError as error:
        raise UserError(f"{path}: the page of the dry run cannot be written: {error.strerror}") from error
    log.info("%-10s %s", "page", path)


def version_facts(tokenizer: PreTrainedTokenizerBase) -> tuple[Fact, ...]:
    known = versions()
    packages = ", ".join(f"{name} {number}" for name, number in known["packages"].items() if number)
    return (Fact("halos", str(known["halos"]), known["git_commit"] or ""), Fact("python", known["python"], packages),
            Fact("tokenizer", type(tokenizer).__name__, f"{len(tokenizer):,} tokens"))  # fmt: skip
