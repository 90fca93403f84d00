"""Which checkpoints may go: a pure function, so that it can be tested over every history."""

from collections.abc import Mapping


def expendable(scores: Mapping[int, float | None], *, keep_last: int, keep_best: int, largest: bool) -> list[int]:
    """Steps to delete, oldest first, given each whole checkpoint's score (None where it was never evaluated).

    Kept are the newest `keep_last` (never fewer than one) and the best `keep_best`; of equal scores the newer is kept.
    """
    newest = sorted(scores)[-max(1, keep_last) :]
    ranked = sorted((score if largest else -score, step) for step, score in scores.items() if score is not None)
    best = [step for _, step in ranked[-keep_best:]] if keep_best else []
    return sorted(set(scores) - set(newest) - set(best))
