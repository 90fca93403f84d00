"""PPO against numbers worked by hand in float64."""

import numpy as np
import pytest
import torch

from halos.losses.ppo import adapt, advantages, needs_reference, ppo
from halos.losses.rollouts import whiten

from .rollouts import MASK, RATIO, clip_objective, padded, sampled, valued
from .samples import gradients, number, numbers

SETTINGS = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "entropy_coefficient": 0.0,
    "value_clip": 0.2,
    "value_coefficient": 0.1,
}
OLD = [[-0.7, -0.9, -0.25], [-1.5, -0.8]]
REFERENCE = [[-0.9, -0.9, -0.5], [-1.0, -1.0]]
VALUES = [[0.5, 0.2, 0.1], [-0.3, 0.4]]


def by_hand(gamma: float, lam: float, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Advantages before whitening, and returns: delta_t = r_t + gamma V_t+1 - V_t, A_t = delta_t + gamma lam A_t+1."""
    kl = weight * (np.array([*OLD[0], *OLD[1]]) - np.array([*REFERENCE[0], *REFERENCE[1]]))
    a, returns = np.zeros((2, 3)), np.zeros((2, 3))
    for row, (rewards, values) in enumerate((([-kl[0], -kl[1], -kl[2] + 1.0], VALUES[0]), ([-kl[3], -kl[4] - 2.0], VALUES[1]))):
        following = 0.0
        for t in reversed(range(len(values))):
            after = values[t + 1] if t + 1 < len(values) else 0.0
            following = rewards[t] + gamma * after - values[t] + gamma * lam * following
            a[row, t], returns[row, t] = following, following + values[t]
    return a, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_are_generalized_estimates_with_a_kl_at_every_token(gamma: float, lam: float) -> None:
    given = sampled([1.0, -2.0], [0, 1], OLD, REFERENCE, VALUES)
    found = advantages(given, kl_coefficient=0.05, kl_estimator="k1", gamma=gamma, gae_lambda=lam)
    a, returns = by_hand(gamma, lam, 0.05)
    inside = a[MASK]
    np.testing.assert_allclose(found.advantages.numpy(), (a - inside.mean()) / inside.std() * MASK, rtol=1e-5, atol=1e-6)
    assert found.returns is not None
    np.testing.assert_allclose(found.returns.numpy(), returns, rtol=1e-6, atol=1e-7)
    assert number(found.metrics["kl"]) == pytest.approx(np.mean([0.45, -0.3]), rel=1e-6)


def test_a_critic_that_knows_the_returns_explains_them() -> None:
    exact = sampled([1.0, -2.0], [0, 1], OLD, None, [[1.0, 1.0, 1.0], [-2.0, -2.0]])
    found = advantages(exact, kl_coefficient=0.0, kl_estimator="k1", gamma=1.0, gae_lambda=0.95)
    assert number(found.metrics["value/explained_variance"]) == pytest.approx(1.0)
    nothing = sampled([1.0, -2.0], [0, 1], OLD, None, [[0.0] * 3, [0.0] * 2])
    found = advantages(nothing, kl_coefficient=0.0, kl_estimator="k1", gamma=1.0, gae_lambda=0.95)
    assert number(found.metrics["value/explained_variance"]) == pytest.approx(0.0, abs=0.05)


def test_the_value_is_the_clipped_objective_and_the_larger_of_two_errors() -> None:
    values, old = padded([[0.5, 0.2, 0.1], [-0.3, 0.4]]), padded([[0.0, 0.3, 0.1], [-0.3, 0.9]])
    returns = padded([[1.0, 1.0, 1.0], [-1.0, 0.0]])
    loss = ppo(valued([1.0, -0.5], values, old, returns), **SETTINGS)
    v, o, r = (part.double().numpy() for part in (values, old, returns))
    error = np.maximum((v - r) ** 2, (o + np.clip(v - o, -0.2, 0.2) - r) ** 2)
    wanted = (clip_objective(RATIO, np.array([[1.0], [-0.5]]), 0.2, 0.2) + 0.1 * error / 2) * MASK
    assert loss.per == "token"
    np.testing.assert_allclose(numbers(loss), wanted, rtol=1e-6)
    unclipped = ppo(valued([1.0, -0.5], values, old, returns), **{**SETTINGS, "value_clip": None})
    np.testing.assert_allclose(number(unclipped.metrics["value/loss"]), (((v - r) ** 2) / 2)[MASK].mean(), rtol=1e-6)


def test_a_value_moves_towards_its_return() -> None:
    values = padded([[0.5, 0.2, 0.1], [-0.3, 0.4]]).requires_grad_()
    old = values.detach().clone()
    loss = ppo(valued([0.0, 0.0], values, old, padded([[1.0, 1.0, 1.0], [-1.0, 0.0]])), **SETTINGS)
    (gradient,) = gradients(loss, values)
    assert (gradient[0] < 0).all()
    assert (gradient[1, :2] > 0).all()
    assert gradient[1, 2] == 0


def test_the_coefficient_follows_its_target_within_a_fifth() -> None:
    settings = {"kl_target": 6.0, "kl_horizon": 10_000}
    assert adapt(0.05, 6.6, 64, **settings) == pytest.approx(0.05 * (1 + 0.1 * 64 / 10_000))
    assert adapt(0.05, 600.0, 64, **settings) == pytest.approx(0.05 * (1 + 0.2 * 64 / 10_000))
    assert adapt(0.05, 0.0, 64, **settings) == pytest.approx(0.05 * (1 - 0.2 * 64 / 10_000))
    assert adapt(0.05, 600.0, 64, kl_target=None, kl_horizon=1) == 0.05
    assert (needs_reference(kl_coefficient=0.0), needs_reference(kl_coefficient=0.1)) == (False, True)


def test_whitening_leaves_padding_out() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    found = whiten(torch.tensor([[1.0, 2.0], [3.0, 99.0]]), mask)
    np.testing.assert_allclose(found, [[-np.sqrt(1.5), 0], [np.sqrt(1.5), 0]], atol=1e-6)
