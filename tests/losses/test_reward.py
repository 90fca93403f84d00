"""Bradley-Terry reward models."""

import numpy as np
import pytest
import torch
from torch import Tensor

from halos.losses.reward import bradley_terry
from halos.types import PairScores

from .samples import gradients, number, numbers, softplus

CHOSEN, REJECTED, MARGIN = np.array([1.0, -0.5, 2.0]), np.array([0.25, 0.5, 2.0]), np.array([0.0, 0.0, 1.0])


def scores(chosen: np.ndarray = CHOSEN, rejected: np.ndarray = REJECTED, margin: np.ndarray = MARGIN) -> PairScores:
    def leaf(values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, requires_grad=True)

    return PairScores(leaf(chosen), leaf(rejected), torch.tensor(margin, dtype=torch.float32))


def test_the_value_is_the_one_worked_by_hand():
    loss = bradley_terry(scores(), centering=0.01)
    by_hand = softplus(-(CHOSEN - REJECTED - MARGIN)) + 0.01 * (CHOSEN + REJECTED) ** 2
    assert numbers(loss) == pytest.approx(by_hand, abs=1e-6)
    assert numbers(loss) == pytest.approx([0.402496, 1.313262, 1.473262], abs=1e-6)


def test_a_head_that_scores_nothing_costs_ln_2():
    assert numbers(bradley_terry(scores(np.zeros(2), np.zeros(2), np.zeros(2)), centering=0.01)) == pytest.approx(np.log(2))


def test_only_the_difference_matters_until_it_is_centred():
    moved = scores(CHOSEN + 3, REJECTED + 3)
    free, pinned = bradley_terry(moved, centering=0.0), bradley_terry(moved, centering=0.01)
    assert numbers(free) == pytest.approx(numbers(bradley_terry(scores(), centering=0.0)), abs=1e-6)
    assert numbers(pinned) - numbers(free) == pytest.approx(0.01 * (CHOSEN + REJECTED + 6) ** 2, abs=1e-5)


def test_a_margin_asks_for_more_and_does_not_change_the_accuracy():
    plain = bradley_terry(scores(margin=np.zeros(3)), centering=0.0)
    asked = bradley_terry(scores(margin=np.full(3, 5.0)), centering=0.0)
    assert (numbers(asked) > numbers(plain)).all()
    assert number(asked.metrics["accuracy"]) == number(plain.metrics["accuracy"]) == pytest.approx(1 / 2)  # a tie is half a win


def test_chosen_is_pushed_up_and_rejected_down_and_both_towards_the_centre():
    given = scores()
    chosen, rejected = gradients(bradley_terry(given, centering=0.0), given.chosen, given.rejected)
    push = 1 / (1 + np.exp(CHOSEN - REJECTED - MARGIN))
    assert chosen == pytest.approx(-push, abs=1e-6)
    assert rejected == pytest.approx(push, abs=1e-6)
    centred = gradients(bradley_terry(given, centering=0.5), given.chosen, given.rejected)
    assert centred[0] - chosen == pytest.approx(CHOSEN + REJECTED, abs=1e-6)
    assert centred[1] - rejected == pytest.approx(CHOSEN + REJECTED, abs=1e-6)


def test_swapping_chosen_and_rejected_adds_the_difference():
    there = bradley_terry(scores(margin=np.zeros(3)), centering=0.01)
    back = bradley_terry(scores(REJECTED, CHOSEN, np.zeros(3)), centering=0.01)
    assert numbers(back) - numbers(there) == pytest.approx(CHOSEN - REJECTED, abs=1e-6)


def test_metrics_are_the_ones_worked_by_hand():
    metrics = {k: number(v) for k, v in bradley_terry(scores(), centering=0.01).metrics.items()}
    expected = {"accuracy": 1 / 2, "rewards/chosen": 2.5 / 3, "rewards/rejected": 2.75 / 3, "rewards/margins": -0.25 / 3}
    assert metrics == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("difference", [-1e4, 1e4])
def test_scores_of_any_size_stay_finite(difference: float):
    loss = bradley_terry(scores(np.array([difference]), np.zeros(1), np.zeros(1)), centering=0.0)
    assert numbers(loss) == pytest.approx([max(0.0, -difference)], abs=1e-3)
