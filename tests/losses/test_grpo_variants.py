"""Settings of GRPO that have a formula of their own: SAPO, OPO, MaxRL, the dual clip and the mask of what the policy has left."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from halos.losses.grpo import advantages, check, check_rewards, grpo
from halos.losses.ppo import ppo
from halos.losses.reinforce_plus_plus import reinforce_plus_plus
from halos.losses.rloo import rloo
from halos.types import Loss, Rollouts, TokenLogps, ValuedRollouts

from .rollouts import MASK, OLD, RATIO, padded, rollouts, sampled
from .samples import gradients, number, numbers
from .test_grpo import FIT, PLAIN

SAPO = {**PLAIN, "objective": "sapo", "clip_low": None, "clip_high": None, "tau_positive": 1.0, "tau_negative": 1.05}
UNSCALED = {"std_ddof": 1, "epsilon": 0.0}
FAR = [[-0.7, -0.9, -0.25], [0.5, -0.8]]  # the policy has raised a token of the second completion to e^2 times its probability


def test_sapos_gate_is_a_logistic_function_of_the_ratio() -> None:
    loss = grpo(rollouts([1.0, -0.5]), None, **SAPO)
    tau, a = np.array([[1.0], [1.05]]), np.array([[1.0], [-0.5]])
    per_token = -4 / tau / (1 + np.exp(-tau * (RATIO - 1))) * a * MASK
    np.testing.assert_allclose(numbers(loss), per_token.sum(1) / [3, 2], rtol=1e-6)
    assert numbers(loss) == pytest.approx([-2.041804, 0.941884], abs=1e-6)
    assert number(loss.metrics["clip_fraction"]) == 0.0


def test_sapos_gradient_is_that_of_the_others_at_ratio_1_and_shrinks_on_both_sides() -> None:
    at_start = rollouts([1.0, -0.5], OLD)
    loss = grpo(at_start, None, **SAPO)
    np.testing.assert_allclose(numbers(loss), [-2.0, 0.5 * 2 / 1.05], rtol=1e-6)
    (gradient,) = gradients(loss, at_start.logps.values)
    np.testing.assert_allclose(gradient, np.array([[-1.0], [0.5]]) / [[3], [2]] * MASK, rtol=1e-6)
    moved = rollouts([1.0, -0.5])
    (gradient,) = gradients(grpo(moved, None, **SAPO), moved.logps.values)
    tau, a = np.array([[1.0], [1.05]]), np.array([[1.0], [-0.5]])
    gate = 1 / (1 + np.exp(-tau * (RATIO - 1)))
    np.testing.assert_allclose(gradient, -4 * gate * (1 - gate) * RATIO * a * MASK / [[3], [2]], rtol=1e-5)
    assert (gradient[0] < 0).all()
    assert (gradient[1, :2] > 0).all(), "no token is left alone, as a clip would"


def test_opos_baseline_is_the_mean_reward_weighted_by_length() -> None:
    rows = [[-1.0] * 4, [-1.0], [-1.0] * 3, [-1.0] * 4, []]
    found = advantages(sampled([1.0, 0.0, 3.0, 3.0, 7.0], [0, 0, 1, 1, 2], rows), baseline="length", advantage_scale="none",
                       **UNSCALED).advantages  # fmt: skip
    np.testing.assert_allclose(found[:, 0], [1 - 4 / 5, -4 / 5, 0, 0, 0], atol=1e-7)
    assert (found[1, 1:] == 0).all()
    assert found[4].eq(0).all(), "of a completion that is masked nothing is known, and nothing divided by its length"


def test_maxrl_divides_by_the_mean_reward_and_learns_nothing_without_a_success() -> None:
    given = sampled([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0], [0, 0, 0, 0, 1, 2, 2])
    found = advantages(given, baseline="mean", advantage_scale="mean", **UNSCALED).advantages[:, 0]
    np.testing.assert_allclose(found, [3, -1, -1, -1, 0, 0, 0], rtol=1e-6)
    assert check_rewards(np.array([0.0, 1.0]), advantage_scale="mean") is None
    assert "one is -1" in str(check_rewards(np.array([1.0, -1.0]), advantage_scale="mean"))
    assert check_rewards(np.array([1.0, -1.0]), advantage_scale="group") is None


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_maxrls_gradient_is_that_of_the_log_of_the_success_to_the_order_of_the_samples(samples: int) -> None:
    """By enumeration of all groups of a three-armed bandit whose first arm succeeds."""
    logits = torch.tensor([-0.5, 0.3, 0.9], dtype=torch.float64, requires_grad=True)
    policy, expected = logits.softmax(-1), torch.zeros(3, dtype=torch.float64)
    for arms in product(range(3), repeat=samples):
        group = sampled([float(arm == 0) for arm in arms], [0] * samples)
        a = advantages(group, baseline="mean", advantage_scale="mean", **UNSCALED).advantages[:, 0]
        chance = policy[list(arms)].prod().item()
        score = (a.double() * logits.log_softmax(-1)[list(arms)]).mean()
        expected += chance * torch.autograd.grad(score, logits, retain_graph=True)[0]
    truncated = -sum((1 - policy[0]) ** k / k for k in range(1, samples))
    torch.testing.assert_close(expected, torch.autograd.grad(truncated, logits)[0], rtol=1e-6, atol=1e-9)


def _ppo(given: Rollouts, **bounds: Any) -> Loss:
    zeros = torch.zeros(2, 3)
    whole = ValuedRollouts(given.logps, given.old, given.advantages, given.rewards, zeros, zeros, zeros)
    return ppo(whole, value_clip=None, value_coefficient=0.0, entropy_coefficient=0.0, **bounds)


@pytest.mark.parametrize("loss", [lambda given, **bounds: grpo(given, None, **{**PLAIN, "aggregation": "token", **bounds}),
                                  partial(reinforce_plus_plus, entropy_coefficient=0.0), _ppo],
                         ids=["grpo", "reinforce_plus_plus", "ppo"])  # fmt: skip
def test_the_dual_clip_bounds_what_a_bad_token_costs(loss: Callable[..., Loss]) -> None:
    given = rollouts([1.0, -0.5], FAR)
    free, held = (loss(given, clip_low=0.2, clip_high=0.2, dual_clip=dual) for dual in (None, 3.0))
    assert numbers(free)[1, 0] == pytest.approx(0.5 * np.exp(2.0), rel=1e-6)
    assert numbers(held)[1, 0] == pytest.approx(0.5 * 3, rel=1e-6)
    np.testing.assert_array_equal(np.delete(numbers(free), 3), np.delete(numbers(held), 3))
    assert (number(free.metrics["clip_fraction"]), number(held.metrics["clip_fraction"])) == (0.0, pytest.approx(1 / 5))
    (gradient,) = gradients(held, given.logps.values)
    assert gradient[1, 0] == 0.0
    better = rollouts([1.0, 0.5], FAR)
    assert numbers(loss(better, clip_low=0.2, clip_high=0.2, dual_clip=1.1))[1, 0] == pytest.approx(-0.5 * 1.2)


def test_the_dual_clip_of_rloo_is_of_a_whole_completion() -> None:
    given = rollouts([1.0, -0.5], FAR)
    held = rloo(given, clip_low=0.2, clip_high=0.2, dual_clip=3.0, entropy_coefficient=0.0)
    assert numbers(held) == pytest.approx([-1.0, 0.5 * 3])
    assert gradients(held, given.logps.values)[0][1].tolist() == [0.0, 0.0, 0.0]
    assert number(held.metrics["clip_fraction"]) == pytest.approx(2 / 5)


def test_a_bad_completion_that_the_policy_has_left_is_masked_and_its_kl_is_not() -> None:
    """The second has log pi_old / pi of 0.5 and -0.3: 0.1 nats a token; the first, which is as far, is good."""
    new = [[-1.7, -1.9, -1.25], [-2.0, -0.5]]
    reference = TokenLogps(padded([[-0.4, -1.1, -0.5], [-1.0, -0.5]]), torch.from_numpy(MASK))
    given = rollouts([1.0, -0.5], new)
    free, kept, masked = (numbers(grpo(given, None, **{**PLAIN, "off_policy_threshold": most})) for most in (None, 0.11, 0.09))
    np.testing.assert_array_equal(kept, free)
    assert masked.tolist() == [free[0], 0.0]
    with_kl = {**PLAIN, "beta": 0.1}
    free, masked = (grpo(given, reference, **{**with_kl, "off_policy_threshold": most}) for most in (None, 0.09))
    policy_part = numbers(grpo(given, None, **PLAIN))[1]
    assert numbers(masked)[1] == pytest.approx(numbers(free)[1] - policy_part, rel=1e-6)
    assert number(masked.metrics["off_policy/masked"]) == 0.5


def test_a_clip_and_a_gate_exclude_each_other() -> None:
    assert check(**FIT) is None
    gate = {"clip_low": None, "clip_high": None, "tau_positive": 1.0, "tau_negative": 1.05}
    assert check(**{**FIT, **gate, "objective": "sapo"}) is None
    assert "no clip" in str(check(**{**FIT, "objective": "sapo"}))
    assert "no gate" in str(check(**{**FIT, **gate}))
    assert "ratio=token" in str(check(**{**FIT, **gate, "objective": "sapo", "ratio": "sequence"}))
    assert "dual_clip" in str(check(**{**FIT, "objective": "cispo", "dual_clip": 3.0}))
    assert check(**{**FIT, "objective": "cispo", "clip_low": None}) is None
    for objective, name in (("cispo", "clip_high"), ("clip", "clip_low")):
        assert "give loss.clip_low and clip_high" in str(check(**{**FIT, "objective": objective, name: None}))
