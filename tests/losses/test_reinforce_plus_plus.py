"""REINFORCE++ against numbers worked by hand in float64."""

import numpy as np

from halos.losses.reinforce_plus_plus import advantages, needs_reference, reinforce_plus_plus

from .rollouts import MASK, RATIO, clip_objective, rollouts, sampled
from .samples import numbers

OLD, REFERENCE = [[-0.7, -0.9, -0.25], [-1.5, -0.8]], [[-0.9, -0.9, -0.5], [-1.0, -1.0]]


def whitened(returns: np.ndarray) -> np.ndarray:
    inside = returns[MASK]
    return (returns - inside.mean()) / inside.std() * MASK


def test_returns_are_the_reward_less_the_kl_that_is_still_to_come() -> None:
    found = advantages(sampled([1.0, 0.0], [0, 0], OLD, REFERENCE), kl_coefficient=0.1, kl_estimator="k1", group_baseline=False)
    kl = 0.1 * np.array([[0.2, 0.0, 0.25], [-0.5, 0.2, 0.0]])
    returns = np.array([[1.0], [0.0]]) - kl[:, ::-1].cumsum(1)[:, ::-1]
    np.testing.assert_allclose(found.advantages.numpy(), whitened(returns), rtol=1e-5, atol=1e-6)


def test_with_a_baseline_rewards_are_relative_to_their_group() -> None:
    given = sampled([3.0, 1.0], [0, 0], OLD)
    found = advantages(given, kl_coefficient=0.0, kl_estimator="k1", group_baseline=True)
    np.testing.assert_allclose(found.advantages.numpy(), whitened(np.array([[1.0] * 3, [-1.0] * 3])), rtol=1e-5, atol=1e-6)
    assert (needs_reference(kl_coefficient=0.0), needs_reference(kl_coefficient=0.1)) == (False, True)


def test_the_value_is_ppos_over_all_tokens() -> None:
    loss = reinforce_plus_plus(rollouts([1.0, -0.5]), clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coefficient=0.0)
    assert loss.per == "token"
    np.testing.assert_allclose(numbers(loss), clip_objective(RATIO, np.array([[1.0], [-0.5]]), 0.2, 0.2) * MASK, rtol=1e-6)
