"""GRPO and its variants against numbers worked by hand in float64."""

import numpy as np
import pytest
import torch

from halos.losses import rloo
from halos.losses.grpo import advantages, check, grpo, needs_reference
from halos.losses.rollouts import kl
from halos.types import TokenLogps

from .rollouts import MASK, NEW, RATIO, clip_objective, padded, rollouts, sampled
from .samples import gradients, logps, number, numbers

PLAIN = {"objective": "clip", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "tau_positive": None,
         "tau_negative": None, "off_policy_threshold": None, "aggregation": "sequence", "max_tokens": None, "beta": 0.0,
         "kl_estimator": "k3", "kl_ratio": True, "entropy_coefficient": 0.0}  # fmt: skip
FIT = {name: value for name, value in PLAIN.items() if name != "off_policy_threshold"}  # that settings are checked of
FIT |= {"entropy_target": None, "entropy_most": 1.0}
A = np.array([[1.0], [-0.5]])


def test_an_advantage_is_the_reward_relative_to_its_group() -> None:
    given = sampled([1.0, 0.0, 0.0, 3.0, 3.0], [0, 0, 0, 1, 1])
    mean, spread = 1 / 3, np.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2)
    found = advantages(given, baseline="mean", advantage_scale="group", std_ddof=1, epsilon=1e-4).advantages[:, 0]
    np.testing.assert_allclose(found, [(1 - mean) / (spread + 1e-4), *[-mean / (spread + 1e-4)] * 2, 0, 0], rtol=1e-6)
    biased = advantages(given, baseline="mean", advantage_scale="group", std_ddof=0, epsilon=0.01).advantages[0, 0]
    assert biased.item() == pytest.approx((1 - mean) / (spread * np.sqrt(2 / 3) + 0.01), rel=1e-6)
    bare = advantages(given, baseline="mean", advantage_scale="none", std_ddof=1, epsilon=1e-4).advantages[:, 0]
    np.testing.assert_allclose(bare, [1 - mean, -mean, -mean, 0, 0], rtol=1e-6)
    rewards = np.array([1.0, 0, 0, 3, 3])
    batch = advantages(given, baseline="mean", advantage_scale="batch", std_ddof=1, epsilon=0.0).advantages[0, 0]
    assert batch.item() == pytest.approx((1 - mean) / rewards.std(ddof=1), rel=1e-6)


def test_groups_without_a_difference_are_counted() -> None:
    found = advantages(
        sampled([1.0, 0.0, 3.0, 3.0], [7, 7, 2, 2]), baseline="mean", advantage_scale="group", std_ddof=1, epsilon=1e-4
    )
    assert number(found.metrics["groups/all_equal"]) == 0.5


def test_the_deviation_of_the_advantages_is_that_of_the_batch() -> None:
    given = sampled([1.0, 0.0, 0.0, 3.0], [0, 0, 0, 1])
    of_grpo = advantages(given, baseline="mean", advantage_scale="none", std_ddof=1, epsilon=1e-4)
    assert number(of_grpo.metrics["advantages/std"]) == pytest.approx(np.sqrt(1 / 6), rel=1e-6)  # of 2/3, -1/3, -1/3 and 0
    assert number(rloo.advantages(given, beta=0.0).metrics["advantages/std"]) == pytest.approx(np.sqrt(3 / 8), rel=1e-6)


def test_a_group_scattered_over_the_batch_is_one_group() -> None:
    together = advantages(
        sampled([1.0, 0.0, 2.0, 5.0], [0, 0, 1, 1]), baseline="mean", advantage_scale="group", std_ddof=1, epsilon=1e-4
    )
    apart = advantages(
        sampled([1.0, 2.0, 0.0, 5.0], [0, 1, 0, 1]), baseline="mean", advantage_scale="group", std_ddof=1, epsilon=1e-4
    )
    np.testing.assert_array_equal(together.advantages[[0, 2, 1, 3]], apart.advantages)


def test_grpo_is_the_mean_over_each_completions_tokens() -> None:
    per_token = clip_objective(RATIO, A, 0.2, 0.2) * MASK
    np.testing.assert_allclose(numbers(grpo(rollouts([1.0, -0.5]), None, **PLAIN)), per_token.sum(1) / [3, 2], rtol=1e-6)


def test_dapo_is_the_mean_over_all_tokens_with_a_higher_clip() -> None:
    loss = grpo(rollouts([1.0, -0.5]), None, **{**PLAIN, "aggregation": "token", "clip_high": 0.28})
    assert loss.per == "token"
    np.testing.assert_allclose(numbers(loss), clip_objective(RATIO, A, 0.2, 0.28) * MASK, rtol=1e-6)


def test_dr_grpo_divides_by_a_constant() -> None:
    loss = grpo(rollouts([1.0, -0.5]), None, **{**PLAIN, "aggregation": "constant", "max_tokens": 8})
    np.testing.assert_allclose(numbers(loss), (clip_objective(RATIO, A, 0.2, 0.2) * MASK).sum(1) / 8, rtol=1e-6)


def test_gspo_has_one_ratio_for_a_completion() -> None:
    loss = grpo(rollouts([1.0, -0.5]), None, **{**PLAIN, "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4})
    ratio = np.exp(np.array([[0.1 / 3], [-0.2 / 2]]))
    np.testing.assert_allclose(numbers(loss), clip_objective(ratio, A, 3e-4, 4e-4)[:, 0], rtol=1e-6)


def test_cispo_caps_the_weight_and_keeps_every_gradient() -> None:
    policy, keys = rollouts([1.0, -0.5]), {**PLAIN, "objective": "cispo", "clip_high": 0.1, "aggregation": "token"}
    loss = grpo(policy, None, **{**keys, "clip_low": None})
    weight = np.minimum(RATIO, 1.1)
    np.testing.assert_allclose(numbers(loss), -weight * A * padded(NEW).double().numpy() * MASK, rtol=1e-6)
    (gradient,) = gradients(loss, policy.logps.values)
    np.testing.assert_allclose(gradient, -weight * A * MASK, rtol=1e-6)
    assert number(loss.metrics["clip_fraction"]) == pytest.approx(2 / 5)  # e^0.2 and e^0.3 are above 1.1
    bounded = grpo(policy, None, **{**keys, "clip_low": 0.3})
    weight = weight.clip(0.7)  # which e^-0.5 is below
    np.testing.assert_allclose(numbers(bounded), -weight * A * padded(NEW).double().numpy() * MASK, rtol=1e-6)
    assert number(bounded.metrics["clip_fraction"]) == pytest.approx(3 / 5)


def test_the_kl_to_the_reference_is_added_token_by_token() -> None:
    reference = TokenLogps(padded([[-0.4, -1.1, -0.5], [-1.0, -0.5]]), torch.from_numpy(MASK))
    d = padded(NEW).double().numpy() - reference.values.double().numpy()
    bare = {**PLAIN, "kl_ratio": False}
    without, added = (grpo(rollouts([1.0, -0.5]), reference, **{**bare, "beta": beta}) for beta in (0.0, 0.04))
    k3 = (np.exp(-d) - 1 + d) * MASK
    np.testing.assert_allclose(numbers(added) - numbers(without), 0.04 * k3.sum(1) / [3, 2], atol=1e-7)
    weighted = grpo(rollouts([1.0, -0.5]), reference, **{**PLAIN, "beta": 0.04})
    np.testing.assert_allclose(numbers(weighted) - numbers(without), 0.04 * (RATIO * k3).sum(1) / [3, 2], atol=1e-7)
    assert number(added.metrics["kl"]) == pytest.approx(k3.sum() / 5, rel=1e-5)


def test_the_estimators_of_the_kl() -> None:
    policy, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert kl("k1", policy, reference).item() == pytest.approx(0.5)
    assert kl("k2", policy, reference).item() == pytest.approx(0.125)
    assert kl("k3", policy, reference).item() == pytest.approx(np.exp(-0.5) - 1 + 0.5, rel=1e-6)


def test_a_better_completion_becomes_likelier_and_a_clipped_token_is_left_alone() -> None:
    policy = rollouts([1.0, -0.5])
    (gradient,) = gradients(grpo(policy, None, **PLAIN), policy.logps.values)
    assert (gradient[0, 1:] < 0).all()  # descent raises the log-prob of what is better than its group
    assert gradient[0, 0] == 0  # e^0.2 > 1.2 already
    assert gradient[1, 1] > 0
    assert gradient[1, 0] == 0  # e^-0.5 < 0.8 already
    assert gradient[1, 2] == 0


def test_on_the_policy_that_sampled_the_value_is_minus_the_advantage() -> None:
    policy = rollouts([1.0, -0.5], [[-0.7, -0.9, -0.25], [-1.5, -0.8]])
    loss = grpo(policy, None, **PLAIN)
    np.testing.assert_allclose(numbers(loss), [-1.0, 0.5], rtol=1e-6)
    assert number(loss.metrics["clip_fraction"]) == number(loss.metrics["approx_kl"]) == 0.0
    assert number(loss.metrics["entropy"]) == pytest.approx((0.7 + 0.9 + 0.25 + 1.5 + 0.8) / 5)
    assert (number(loss.metrics["reward"]), number(loss.metrics["length"])) == (0.5, 2.5)


def test_settings_that_cannot_go_together_are_reported() -> None:
    fit = {**FIT, "beta": 0.1, "kl_estimator": "k1"}
    assert check(**fit) is None
    assert "max_tokens" in str(check(**{**fit, "aggregation": "constant"}))
    assert "cispo" in str(check(**{**fit, "objective": "cispo", "ratio": "sequence"}))
    assert "without a gradient" in str(check(**{**fit, "kl_ratio": False}))
    assert check(**{**fit, "kl_ratio": False, "beta": 0.0}) is None
    assert (needs_reference(beta=0.0), needs_reference(beta=0.1)) == (False, True)


def test_a_ratio_of_any_size_stays_finite() -> None:
    policy = rollouts([1.0, -0.5], [[-0.5, 60.0, -400.0], [90.0, -0.5]])
    assert np.isfinite(numbers(grpo(policy, None, **PLAIN))).all()
    assert logps([[0.0]]).mask.all()
