"""Counts over scores: which samples have none and why, and what each of several reward functions gave."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from halos.errors import UserError
from halos.rollout.types import Rollout, Score

_DETAIL = re.compile(r": | \(")  # what follows is about one sample
SHOWN = 3  # reasons in a message


def reasons(scores: Iterable[Score]) -> dict[str, int]:
    """Count the scores without a value by their reason, the most frequent first; details of single samples are left out."""
    counts: dict[str, int] = {}
    for score in scores:
        if score.value is None:
            reason = _DETAIL.split(score.problem, maxsplit=1)[0] or "no reason is recorded"
            counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda each: -each[1]))


class ScoringError(UserError):
    """Samples got no scores. What gives them, perhaps a server, may work again later: a run saves a checkpoint before it ends."""


def lack(scores: Sequence[Score]) -> str | None:
    """`12 of 64 samples have no score: 9 x mine.tests raised KeyError, 3 x took longer than 30 s`; None where all have one."""
    counts = reasons(scores)
    if not counts:
        return None
    without, first = sum(counts.values()), next(score.problem for score in scores if score.value is None)
    subject = f"{without} of {len(scores)} samples have no score"
    if without == len(scores):
        subject = f"none of {without} samples has a score"
    named = [f"{count} x {reason}" for reason, count in list(counts.items())[:SHOWN]]
    more = [f"{len(counts) - SHOWN} more reasons"] if len(counts) > SHOWN else []
    detail = f" (the first: {first})" if first not in counts and first else ""
    return f"{subject}: {', '.join([*named, *more])}{detail}"


def by_function(rollouts: Sequence[Rollout]) -> dict[str, tuple[float, int]]:
    """For each of several functions the sum of its raw rewards and the number of samples to which it applies."""
    totals: dict[str, tuple[float, int]] = {}
    for rollout in rollouts:
        for name, value in rollout.score.parts.items():
            total, count = totals.get(name, (0.0, 0))
            totals[name] = total + value, count + 1
    return totals


def function_metrics(rollouts: Sequence[Rollout]) -> Mapping[str, float]:
    """`function/NAME`, the mean over the samples to which a function applies, and `function/NAME/applies`, the fraction of the
    samples with a score that these are. Nothing where there is one function, whose reward is the score."""
    scored = sum(rollout.score.value is not None for rollout in rollouts)
    metrics: dict[str, float] = {}
    for name, (total, count) in by_function(rollouts).items():
        metrics |= {f"function/{name}": total / count, f"function/{name}/applies": count / scored}
    return metrics
