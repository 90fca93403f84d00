"""IPO: a regression of the difference of log-ratios to 1 / (2 tau)."""

from typing import Literal, get_args, get_type_hints

import numpy as np
import pytest

from halos.losses.ipo import ipo

from .samples import POLICY, REFERENCE, gradients, margins, number, numbers, pair

Average = Literal["mean", "sum"]
G: dict[str, np.ndarray] = {"mean": np.array([0.75 / 3 + 0.75 / 2, -0.75 / 2 - 0.25 / 4]), "sum": np.array([1.5, -1.0])}


@pytest.mark.parametrize(("average", "by_hand"), [("mean", [19.140625, 29.56640625]), ("sum", [12.25, 36.0])])
def test_the_value_is_the_one_worked_by_hand(average: Average, by_hand: list[float]):
    loss = ipo(pair(*POLICY), pair(*REFERENCE), tau=0.1, average=average)
    assert numbers(loss) == pytest.approx((G[average] - 5.0) ** 2, rel=1e-6)
    assert numbers(loss) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("average", ["mean", "sum"])
def test_a_policy_that_equals_its_reference_costs_25_and_not_nan(average: Average):
    """HALOs counts the tokens whose log-ratio is not 0 as the length, which is 0 / 0 here."""
    policy = pair(*POLICY)
    loss = ipo(policy, pair(*POLICY), tau=0.1, average=average)
    assert numbers(loss) == pytest.approx(25.0, rel=1e-6)
    for gradient in gradients(loss, policy.chosen.values, policy.rejected.values):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).sum() > 0


def test_tokens_on_which_policy_and_reference_agree_still_count_as_length():
    policy, reference = pair([[-1.0, -0.5, -0.5, -0.5]], [[-1.0]]), pair([[-2.0, -0.5, -0.5, -0.5]], [[-1.0]])
    loss = ipo(policy, reference, tau=0.1, average="mean")
    assert numbers(loss) == pytest.approx([(1 / 4 - 5) ** 2], rel=1e-6)


@pytest.mark.parametrize("average", ["mean", "sum"])
@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
def test_it_pulls_towards_the_target_from_both_sides(average: Average, tau: float):
    target = 1 / (2 * tau)
    policy, reference = margins(target - 1, target, target + 1)  # one token a row: both averages agree
    loss = ipo(policy, reference, tau=tau, average=average)
    chosen, rejected = gradients(loss, policy.chosen.values, policy.rejected.values)
    assert numbers(loss) == pytest.approx([1, 0, 1], abs=1e-4)
    assert chosen[:, 0] == pytest.approx([-2, 0, 2], abs=1e-4)
    assert rejected[:, 0] == pytest.approx([2, 0, -2], abs=1e-4)


def test_the_mean_spreads_the_gradient_over_the_tokens():
    policy = pair(*POLICY)
    loss = ipo(policy, pair(*REFERENCE), tau=0.1, average="mean")
    chosen, rejected = gradients(loss, policy.chosen.values, policy.rejected.values)
    pull = 2 * (G["mean"] - 5.0)
    assert chosen[policy.chosen.mask] == pytest.approx(np.repeat(pull / [3, 2], [3, 2]), rel=1e-5)
    assert rejected[policy.rejected.mask] == pytest.approx(-np.repeat(pull / [2, 4], [2, 4]), rel=1e-5)


@pytest.mark.parametrize("average", ["mean", "sum"])
def test_swapping_chosen_and_rejected_turns_the_difference_round(average: Average):
    """(-g - c)^2 - (g - c)^2 = 4 g c, c = 5."""
    there = ipo(pair(*POLICY), pair(*REFERENCE), tau=0.1, average=average)
    back = ipo(pair(*reversed(POLICY)), pair(*reversed(REFERENCE)), tau=0.1, average=average)
    assert numbers(back) - numbers(there) == pytest.approx(20 * G[average], rel=1e-5)


@pytest.mark.parametrize("average", ["mean", "sum"])
def test_a_pair_at_the_target_has_a_reward_margin_of_one_half(average: Average):
    policy, reference = margins(5.0)
    assert number(ipo(policy, reference, tau=0.1, average=average).metrics["rewards/margins"]) == pytest.approx(0.5, abs=1e-6)


def test_the_two_conventions_are_the_two_that_the_signature_allows():
    assert get_args(get_type_hints(ipo)["average"]) == ("mean", "sum")
