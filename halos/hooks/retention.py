"""Decides which checkpoints may be deleted: a pure function, so that it can be tested over every history."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retention:
    """The retention policy of `checkpoint.{keep_last,keep_best,keep_every,pinned}` and `objective.mode`."""

    keep_last: int
    keep_best: int
    keep_every: int | None
    pinned: frozenset[int]
    largest: bool

    def permanent(self, step: int) -> bool:
        return step in self.pinned or (self.keep_every is not None and step % self.keep_every == 0)

    def expendable(self, scores: Mapping[int, float | None], good_until: int) -> list[int]:
        """Steps to delete, oldest first, given the objective of each complete checkpoint (None where it was never evaluated).

        Kept are the newest `keep_last` (at least one), the best `keep_best`, all permanent ones, and the newest of those up to
        `good_until`, whose weights are known to be good. Of equal scores the newer is kept; a score that is not finite counts as
        None.
        """
        newest = sorted(scores)[-max(1, self.keep_last) :]
        known = [(score, step) for step, score in scores.items() if score is not None and math.isfinite(score)]
        ranked = sorted((score if self.largest else -score, step) for score, step in known)
        best = [step for _, step in ranked[-self.keep_best :]] if self.keep_best else []
        good = sorted(step for step in scores if step <= good_until)[-1:]
        return sorted(step for step in {*scores} - {*newest} - {*best} - {*good} if not self.permanent(step))

    def max_on_disk(self, steps: Collection[int]) -> int:
        """The largest number of checkpoints on disk at once, in a run that saves at `steps` and skips no step."""
        permanent = sum(map(self.permanent, steps))
        return min(len(steps), max(1, self.keep_last) + self.keep_best + permanent + 1)  # one being written
