"""SLiC-HF: a hinge on log-probs, and cross-entropy on the chosen completion."""

import inspect
from typing import Literal, get_args, get_type_hints

import numpy as np
import pytest

from halos.losses.slic import slic

from .samples import POLICY, gradients, logps, numbers, pair

Average = Literal["mean", "sum"]


@pytest.mark.parametrize(("average", "by_hand"), [("sum", [1.175, 0.75]), ("mean", [1 + 0.175 / 3, 0.5 + 0.25 / 2])])
def test_the_value_is_the_one_worked_by_hand(average: Average, by_hand: list[float]):
    """Hinge: 1 + 1.75 - 1.75, 1 + 2.5 - 3; cross-entropy: .1 x 1.75, .1 x 2.5, over 3 and 2 tokens."""
    loss = slic(pair(*POLICY), delta=1.0, regularization=0.1, average=average)
    assert numbers(loss) == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("average", ["sum", "mean"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_each_pair_costs_one_number_whatever_the_shapes(average: Average, rows: int):
    """HALOs adds a (rows,) hinge to a (rows, time) cross-entropy, which is wrong without an error where rows == time."""
    chosen, rejected = [[-0.5, -1.0, -0.25]] * rows, [[-1.0, -0.75, -0.5]] * rows
    together = slic(pair(chosen, rejected), delta=1.0, regularization=0.1, average=average)
    alone = slic(pair(chosen[:1], rejected[:1]), delta=1.0, regularization=0.1, average=average)
    assert together.values.shape == (rows,)
    assert numbers(together) == pytest.approx(np.repeat(numbers(alone), rows), abs=1e-6)


def test_no_reference_is_asked_for():
    assert "reference" not in inspect.signature(slic).parameters


def test_a_pair_further_apart_than_delta_leaves_only_the_cross_entropy():
    policy = pair([[-0.5, -0.5]], [[-4.0]])
    loss = slic(policy, delta=1.0, regularization=0.1, average="sum")
    chosen, rejected = gradients(loss, policy.chosen.values, policy.rejected.values)
    assert numbers(loss) == pytest.approx([0.1])
    assert chosen[0] == pytest.approx([-0.1, -0.1])
    assert (rejected == 0).all()


def test_a_pair_within_delta_pushes_both_and_the_chosen_a_little_more():
    policy = pair([[-0.5, -0.5]], [[-1.0]])
    loss = slic(policy, delta=1.0, regularization=0.1, average="mean")
    chosen, rejected = gradients(loss, policy.chosen.values, policy.rejected.values)
    assert chosen[0] == pytest.approx([-1.05, -1.05])
    assert rejected[0] == pytest.approx([1.0])


def test_chosen_and_rejected_alike_cost_delta():
    assert numbers(slic(pair([[-1.0]], [[-1.0]]), delta=2.5, regularization=0.0, average="sum")) == pytest.approx([2.5])


def test_swapping_moves_the_hinge_and_the_target():
    there = slic(pair(*POLICY), delta=1.0, regularization=0.1, average="sum")
    back = slic(pair(*reversed(POLICY)), delta=1.0, regularization=0.1, average="sum")
    assert numbers(there) == pytest.approx([1.175, 0.75], abs=1e-6)
    assert numbers(back) == pytest.approx([1 + 0.175, 1.5 + 0.3], abs=1e-6)


def test_the_averages_agree_where_a_completion_is_one_token_long():
    policy = pair([[-2.0]], [[-1.0]])
    whole = slic(policy, delta=1.0, regularization=0.3, average="sum")
    per_token = slic(policy, delta=1.0, regularization=0.3, average="mean")
    assert numbers(whole) == pytest.approx(numbers(per_token))
    assert get_args(get_type_hints(slic)["average"]) == ("mean", "sum")


def test_the_length_of_a_row_is_its_scored_tokens_and_not_the_width_of_the_batch():
    assert logps([[-1.0, -1.0], [-1.0]]).length.tolist() == [2, 1]
