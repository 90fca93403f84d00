"""The loss of process reward models: at the end of each step, how likely that step is right."""

from dataclasses import replace

import torch
from torch.nn.functional import logsigmoid

from halos.examples import Stepwise
from halos.types import Loss, Mean, StepScores


def examples(row: Stepwise, *, separator: str, last_step_only: bool) -> Stepwise:
    """The steps, each followed by `separator`; with `last_step_only` the others have no label (outcome supervision)."""
    labels = row.step_labels
    return replace(row, separator=separator, step_labels=(None,) * (len(labels) - 1) + labels[-1:] if last_step_only else labels)


def prm(steps: StepScores) -> Loss:
    """-y log sigmoid(s) - (1 - y) log sigmoid(-s), the cross-entropy of a step's label y, averaged over all steps of the batch.

    The labels may be 0 and 1 (section 2.6 of arXiv:2305.20050, process supervision of arXiv:2211.14275) or soft, shares of
    completions that end well (eq. 4 of arXiv:2312.08935); s is the difference of the two logits.
    """
    values = -steps.labels * logsigmoid(steps.scores) - (1 - steps.labels) * logsigmoid(-steps.scores)
    good, bad = steps.mask & (steps.labels > 0.5), steps.mask & (steps.labels < 0.5)
    right = ((steps.scores > 0) == (steps.labels > 0.5)).float()
    metrics = {
        "accuracy": Mean.of(right, good | bad),
        "accuracy/good": Mean.of(right, good),
        "accuracy/bad": Mean.of(right, bad),
        "label": Mean.of(steps.labels, steps.mask),
        "score": Mean.of(torch.sigmoid(steps.scores), steps.mask),
    }
    return Loss(values * steps.mask, metrics, per="token")


def check(*, separator: str) -> str | None:
    """Refuse a separator that is empty: a step would end in a token of its words."""
    return None if separator else "separator is empty, and a step's label is read at the end of what follows the step"
