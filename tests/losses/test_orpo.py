"""ORPO: odds that are accurate at every probability, and two terms with denominators of their own."""

import numpy as np
import pytest
import torch

from halos.losses.orpo import log_odds, orpo

from .samples import POLICY, gradients, number, numbers, pair, softplus

MEANS_W, MEANS_L = np.array([-1.75 / 3, -1.25]), np.array([-0.875, -0.75])


def odds(mean: np.ndarray) -> np.ndarray:
    return np.log(np.exp(mean) / (1 - np.exp(mean)))


def test_the_value_is_the_one_worked_by_hand():
    loss = orpo(pair(*POLICY), weight=0.25)
    h = odds(MEANS_W) - odds(MEANS_L)
    assert numbers(loss.terms["loss/odds"]) == pytest.approx(0.25 * softplus(-h), abs=1e-6)
    assert numbers(loss.terms["loss/odds"]) == pytest.approx([0.112158, 0.293081], abs=1e-6)
    assert numbers(loss.terms["loss/nll"]) == pytest.approx(np.array([[0.5, 1.0, 0.25], [2.0, 0.5, 0.0]]))
    assert loss.terms["loss/nll"].per == "chosen_token"
    assert number(loss.metrics["log_odds_ratio"]) == pytest.approx(h.mean(), abs=1e-6)


@pytest.mark.parametrize("logp", [-1e4, -90.0, -20.0, -1.0, -0.6931, -0.693, -1e-3, -1e-6])
def test_the_log_odds_keep_their_digits(logp: float):
    exact = logp - np.log(-np.expm1(np.float64(logp)))
    value = torch.tensor([logp], requires_grad=True)
    odds = log_odds(value)
    odds.sum().backward()
    assert odds.item() == pytest.approx(exact, rel=1e-6, abs=1e-6)
    assert value.grad is not None
    assert value.grad.item() == pytest.approx(-1 / np.expm1(np.float64(logp)), rel=1e-5)


def test_a_completion_that_is_certain_leaves_value_and_gradient_finite():
    policy = pair([[0.0, 0.0]], [[-1.0]])
    loss = orpo(policy, weight=0.1)
    assert numbers(loss).item() == pytest.approx(0.1 * softplus(-(24 * np.log(2) - odds(np.array(-1.0)))), abs=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients(loss, policy.chosen.values, policy.rejected.values))


def test_the_chosen_is_pushed_up_and_the_rejected_down():
    policy = pair(*POLICY)
    chosen, rejected = gradients(orpo(policy, weight=1.0).terms["loss/odds"], policy.chosen.values, policy.rejected.values)
    assert (chosen[policy.chosen.mask.numpy()] < 0).all()
    assert (rejected[policy.rejected.mask.numpy()] > 0).all()
