"""Process reward models: the loss by hand, and against the cross-entropy of transformers' token classifiers."""

import numpy as np
import pytest
import torch

from halos.losses.prm import prm
from halos.types import Item, StepScores

from .samples import number, numbers, softplus

SCORES = np.array([[1.0, -0.5, 2.0], [0.5, -3.0, 0.0], [4.0, 0.0, 0.0]])
LABELS = np.array([[1.0, 0.0, 0.25], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
STEPS = (3, 2, 1)
MASK = np.arange(3) < np.array(STEPS)[:, None]


def steps(scores: np.ndarray = SCORES, labels: np.ndarray = LABELS) -> StepScores:
    return StepScores(torch.tensor(scores).float().requires_grad_(), torch.tensor(MASK), torch.tensor(labels).float())


def test_the_value_is_the_one_worked_by_hand_and_averaged_over_steps():
    loss = prm(steps())
    by_hand = (LABELS * softplus(-SCORES) + (1 - LABELS) * softplus(SCORES)) * MASK
    assert loss.per == "token"
    assert numbers(loss) == pytest.approx(by_hand, abs=1e-6)
    assert numbers(loss)[0] == pytest.approx([0.313262, 0.474077, 1.626928], abs=1e-6)


def test_a_head_that_tells_nothing_costs_ln_2_and_a_soft_label_is_best_at_its_own_log_odds():
    assert numbers(prm(steps(np.zeros((3, 3)))))[MASK] == pytest.approx(np.log(2))
    best = steps(np.full((3, 3), np.log(0.25 / 0.75)), np.full((3, 3), 0.25))
    prm(best).values.sum().backward()
    assert best.scores.grad is not None
    assert best.scores.grad.abs().max() < 1e-7


def test_good_and_bad_steps_are_told_apart_in_the_metrics_and_a_half_is_neither():
    metrics = prm(steps()).metrics
    assert number(metrics["accuracy"]) == pytest.approx(2 / 5)  # right: 1.0 of a good one, -0.5 of a bad one
    assert number(metrics["accuracy/good"]) == pytest.approx(1 / 2)
    assert number(metrics["accuracy/bad"]) == pytest.approx(1 / 3)
    assert number(metrics["label"]) == pytest.approx(2.75 / 6)
    assert number(metrics["score"]) == pytest.approx((1 / (1 + np.exp(-SCORES)))[MASK].mean())
    assert metrics["accuracy"].count == 5


def test_it_is_the_mean_cross_entropy_of_two_logits_with_its_gradient():
    """As transformers' ForTokenClassification, and so TRL, has it: labels of other tokens are -100."""
    logits = torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(0))
    labels = (LABELS > 0.5).astype(np.float32)
    items = [Item(np.zeros(1, np.int32), (), str(n), step_labels=labels[n, :count]) for n, count in enumerate(STEPS)]
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    given = StepScores.of(mine, items)
    assert given.mask.tolist() == MASK.tolist()
    (prm(given).values.sum() / sum(STEPS)).backward()
    target = torch.where(torch.tensor(MASK), torch.tensor(labels).long(), -100)
    torch.nn.functional.cross_entropy(theirs.view(-1, 2), target.view(-1)).backward()
    assert mine.grad is not None
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-7)
