"""SimPO: length-normalised log-probs against a margin."""

import inspect

import numpy as np
import pytest

from halos.losses.simpo import check, simpo

from .samples import POLICY, gradients, number, numbers, pair, softplus

AVERAGES = np.array([-1.75 / 3, -2.5 / 2]), np.array([-1.75 / 2, -3.0 / 4])


def test_the_value_is_the_one_worked_by_hand():
    loss = simpo(pair(*POLICY), beta=2.0, gamma=None, gamma_over_beta=0.5)
    chosen, rejected = AVERAGES
    assert numbers(loss) == pytest.approx(softplus(-(2.0 * (chosen - rejected) - 1.0)), abs=1e-6)
    assert numbers(loss) == pytest.approx([0.923027, 2.126928], abs=1e-6)


def test_chosen_and_rejected_alike_cost_the_margin():
    assert numbers(simpo(pair([[-1.0]], [[-1.0]]), beta=2.0, gamma=0.0, gamma_over_beta=None)) == pytest.approx(np.log(2))
    assert numbers(simpo(pair([[-1.0]], [[-1.0]]), beta=2.0, gamma=3.0, gamma_over_beta=None)) == pytest.approx(softplus(3.0))


def test_gamma_and_gamma_over_beta_name_the_same_margin():
    one = simpo(pair(*POLICY), beta=10.0, gamma=3.0, gamma_over_beta=None)
    other = simpo(pair(*POLICY), beta=10.0, gamma=None, gamma_over_beta=0.3)
    assert numbers(one) == pytest.approx(numbers(other), rel=1e-6)


@pytest.mark.parametrize(
    ("gamma", "gamma_over_beta", "fine"),
    [(1.0, None, True), (None, 0.5, True), (0.0, None, True), (None, 0.0, True), (None, None, False), (1.0, 0.5, False)],
)
def test_one_of_gamma_and_gamma_over_beta_is_asked_for(gamma: float | None, gamma_over_beta: float | None, fine: bool):
    said = check(gamma=gamma, gamma_over_beta=gamma_over_beta)
    assert (said is None) == fine
    assert said is None or ("loss.gamma and" in said and "loss.gamma_over_beta" in said)


def test_a_margin_of_zero_is_a_margin_and_not_an_absent_one():
    loss = simpo(pair(*POLICY), beta=2.0, gamma=None, gamma_over_beta=0.0)
    assert numbers(loss) == pytest.approx(softplus(-2.0 * (AVERAGES[0] - AVERAGES[1])), abs=1e-6)


def test_no_reference_is_asked_for():
    """HALOs loads one that SimPO never reads."""
    assert "reference" not in inspect.signature(simpo).parameters


def test_rewards_are_scaled_by_beta_and_log_probs_are_not():
    metrics = {k: number(v) for k, v in simpo(pair(*POLICY), beta=2.0, gamma=1.0, gamma_over_beta=None).metrics.items()}
    assert metrics["rewards/chosen"] == pytest.approx(2.0 * AVERAGES[0].mean(), abs=1e-6)
    assert metrics["rewards/rejected"] == pytest.approx(2.0 * AVERAGES[1].mean(), abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(2.0 * (AVERAGES[0] - AVERAGES[1]).mean(), abs=1e-6)
    assert metrics["rewards/accuracies"] == 1 / 2  # the first pair; gamma is not part of it
    assert metrics["logps/chosen"] == pytest.approx(-2.125)


def test_a_token_is_pushed_the_less_the_longer_its_completion_is():
    policy = pair(*POLICY)
    loss = simpo(policy, beta=2.0, gamma=1.0, gamma_over_beta=None)
    chosen, rejected = gradients(loss, policy.chosen.values, policy.rejected.values)
    push = 2.0 / (1 + np.exp(2.0 * (AVERAGES[0] - AVERAGES[1]) - 1.0))
    assert chosen[policy.chosen.mask] == pytest.approx(-np.repeat(push / [3, 2], [3, 2]), abs=1e-6)
    assert rejected[policy.rejected.mask] == pytest.approx(np.repeat(push / [2, 4], [2, 4]), abs=1e-6)


def test_repeating_a_completion_changes_nothing():
    once = simpo(pair([[-0.5, -1.5]], [[-2.0]]), beta=2.0, gamma=1.0, gamma_over_beta=None)
    twice = simpo(pair([[-0.5, -1.5] * 2], [[-2.0] * 3]), beta=2.0, gamma=1.0, gamma_over_beta=None)
    assert numbers(once) == pytest.approx(numbers(twice), rel=1e-6)


def test_swapping_chosen_and_rejected_keeps_the_margin_on_the_same_side():
    back = simpo(pair(*reversed(POLICY)), beta=2.0, gamma=1.0, gamma_over_beta=None)
    assert numbers(back) == pytest.approx(softplus(-(2.0 * (AVERAGES[1] - AVERAGES[0]) - 1.0)), abs=1e-6)
