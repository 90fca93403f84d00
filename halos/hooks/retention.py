"""Which checkpoints may go: a pure function, so that it can be tested over every history."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retention:
    """What `checkpoint.{keep_last,keep_best,keep_every,pinned}` and `objective.mode` ask for."""

    keep_last: int
    keep_best: int
    keep_every: int | None
    pinned: frozenset[int]
    largest: bool

    def permanent(self, step: int) -> bool:
        return step in self.pinned or (self.keep_every is not None and step % self.keep_every == 0)

    def expendable(self, scores: Mapping[int, float | None], good_until: int) -> list[int]:
        """Steps to delete, oldest first, given each whole checkpoint's score (None where it was never evaluated).

        Kept are the newest `keep_last` (never fewer than one), the best `keep_best`, the permanent ones beside them, and the
        newest of those up to `good_until`, whose weights are known to be good. Of equal scores the newer is kept; a score that is
        no finite number is none.
        """
        newest = sorted(scores)[-max(1, self.keep_last) :]
        known = [(score, step) for step, score in scores.items() if score is not None and math.isfinite(score)]
        ranked = sorted((score if self.largest else -score, step) for score, step in known)
        best = [step for _, step in ranked[-self.keep_best :]] if self.keep_best else []
        good = sorted(step for step in scores if step <= good_until)[-1:]
        return sorted(step for step in {*scores} - {*newest} - {*best} - {*good} if not self.permanent(step))

    def most(self, saves: Collection[int]) -> int:
        """How many checkpoints lie on the disk at once, at most, in a run that saves at the steps `saves` and skips no step."""
        permanent = sum(map(self.permanent, saves))
        return min(len(saves), max(1, self.keep_last) + self.keep_best + permanent + 1)  # one being written
