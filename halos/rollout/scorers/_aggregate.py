"""From the values of several reward functions to one score: a weighted sum, and that of values standardised within a group."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from halos.rollout.scorers._evaluate import Outcome
from halos.rollout.scorers._reward_functions import Part, names_of
from halos.rollout.types import Score

SUM, NORMALISED = "sum", "normalised"  # what online.scorer.aggregation takes
NOT_APPLICABLE = "no reward function applies"
CONSTANT = 1e-12  # rewards of a group that differ by less are equal
EPSILON = 1e-4  # added to the standard deviation of a group, as in TRL's normalize_then_sum and in loss=grpo


def weighted_sum(parts: Sequence[Part], outcome: Outcome) -> Score:
    """The sum over the functions that apply, with their raw values where there are several functions."""
    if outcome.problem:
        return Score(None, outcome.problem, lacking=outcome.lacking)
    names = names_of(part.path for part in parts)
    applying = [(name, part, value) for name, part, value in zip(names, parts, outcome.values, strict=True) if value is not None]
    if not applying:
        return Score(None, NOT_APPLICABLE)
    total = 0.0
    for _, part, value in applying:
        total += part.weight * value
    return Score(total, parts={name: value for name, _, value in applying} if len(parts) > 1 else {})


def normalised(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> list[float | None]:
    """For the samples of one prompt: the weighted sum of (value - mean) / (std + epsilon), each over those of the samples with a
    score to which the function applies. A function whose values are equal adds 0. Eq. 4 and 5 of arXiv:2601.05242."""
    sums: list[float | None] = [None if each.problem or all(value is None for value in each.values) else 0.0 for each in outcomes]
    for number, part in enumerate(parts):
        column = [(n, value) for n, each in enumerate(outcomes) if not each.problem
                  if (value := each.values[number]) is not None]  # fmt: skip
        values = [value for _, value in column]
        if len(values) < 2 or max(values) - min(values) < CONSTANT:
            continue
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        for n, value in column:
            sums[n] = (sums[n] or 0.0) + part.weight * (value - mean) / (deviation + EPSILON)
    return sums
