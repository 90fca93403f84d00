"""RLOO against numbers worked by hand in float64."""

import numpy as np
import pytest

from halos.losses.rloo import advantages, needs_reference, rloo

from .rollouts import clip_objective, rollouts, sampled
from .samples import gradients, number, numbers


def test_the_baseline_is_the_mean_of_the_others() -> None:
    found = advantages(sampled([1.0, 0.0, 5.0, 2.0], [0, 0, 0, 9]), beta=0.0).advantages[:, 0]
    np.testing.assert_allclose(found, [1 - 2.5, 0 - 3.0, 5 - 0.5, 0], rtol=1e-6)


def test_the_kl_of_a_whole_completion_lowers_its_reward() -> None:
    given = sampled([1.0, 0.0], [0, 0], [[-1.0, -0.5], [-2.0]], [[-1.5, -1.0], [-1.0]])
    found = advantages(given, beta=0.5)
    first, second = 1.0 - 0.5 * 1.0, 0.0 - 0.5 * -1.0
    np.testing.assert_allclose(found.advantages.numpy(), [[first - second] * 2, [second - first, 0.0]], rtol=1e-6)
    assert number(found.metrics["kl"]) == pytest.approx(0.0)
    assert (needs_reference(beta=0.0), needs_reference(beta=0.1)) == (False, True)


def test_a_masked_sample_has_a_reward_in_the_baseline_and_no_divergence() -> None:
    given = sampled([1.0, 0.0, 5.0], [0, 0, 0], [[-1.0, -0.5], [-2.0], []], [[-1.5, -1.0], [-1.0], []])
    found = advantages(given, beta=0.5)
    first, second = 1.0 - 2.5 - 0.5 * (1.0 - -1.0), 0.0 - 3.0 - 0.5 * (-1.0 - 1.0)
    np.testing.assert_allclose(found.advantages.numpy(), [[first] * 2, [second, 0.0], [0.0, 0.0]], rtol=1e-6)


def test_there_is_one_ratio_for_a_completion() -> None:
    loss = rloo(rollouts([1.0, -0.5]), clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coefficient=0.0)
    ratio = np.exp([[0.1], [-0.2]])
    np.testing.assert_allclose(numbers(loss), clip_objective(ratio, np.array([[1.0], [-0.5]]), 0.2, 0.2)[:, 0], rtol=1e-6)


def test_the_gradient_on_the_policy_that_sampled_is_reinforces() -> None:
    policy = rollouts([1.0, -0.5], [[-0.7, -0.9, -0.25], [-1.5, -0.8]])
    (gradient,) = gradients(
        rloo(policy, clip_low=0.2, clip_high=0.2, dual_clip=None, entropy_coefficient=0.0), policy.logps.values
    )
    np.testing.assert_allclose(gradient, [[-1.0, -1.0, -1.0], [0.5, 0.5, 0.0]], rtol=1e-6)
