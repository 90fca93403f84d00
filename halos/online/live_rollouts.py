"""The rollouts of a live loop on disk, a file for each of its last batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from halos.confined import DISK_FULL
from halos.hashes import json_hash
from halos.hooks.base import Hook, Run
from halos.rollout import batch_files
from halos.rollout.scorers.scorer import Scorer
from halos.rollout.types import Rollout

log = logging.getLogger(__name__)


class LiveRollouts(Hook):
    """Writes what was sampled for each batch, on rank 0, and keeps the files of the last `keep` batches (None: of all).

    A batch that a resumed run samples again has the same bytes. Files of later batches than the checkpoint's are deleted when the
    run starts from it.
    """

    def __init__(self, *, keep: int | None, passes: int, scorer: Scorer) -> None:
        """`passes`: optimizer steps on each batch."""
        self.keep, self.passes = keep, passes
        self.rewards = json_hash(scorer.request())  # all that the scores depend on, the code of functions and their keys included

    def on_start(self, run: Run) -> None:
        sampled = -(-run.step // self.passes)  # batches, up to the one within which the checkpoint was saved
        self._delete(run, lambda number: number >= sampled)

    def write(self, run: Run, number: int, rollouts: Sequence[Rollout]) -> None:
        """Write the file of a batch; on a full disk warn, and let the run continue."""
        if self.keep == 0 or not run.main:
            return
        about = {"batch": number, "step": number * self.passes, "rewards_sha256": self.rewards}
        try:
            batch_files.write(run.directory.path, number, [{**rollout.to_row(), **about} for rollout in rollouts])
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            log.warning("the rollouts of batch %d could not be written: %s", number, error)
        if (keep := self.keep) is not None:
            self._delete(run, lambda other: other <= number - keep)

    def _delete(self, run: Run, is_due: Callable[[int], bool]) -> None:
        for number, path in batch_files.files_of(run.directory.path).items() if run.main else ():
            if is_due(number):
                path.unlink(missing_ok=True)
