"""The gradient of each loss's KL against that of KL(policy || reference), by enumerating the five arms of a bandit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from halos.losses import grpo, rloo
from halos.losses.rollouts import rewards_per_token
from halos.types import Rollouts, Sampled, TokenLogps

from . import cases

ARMS, BETA = 5, 0.3
NOW, THEN, START = torch.randn(3, ARMS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))  # logits
ONE_TOKEN = torch.ones(ARMS, 1, dtype=torch.bool)
OF_GRPO = [case for case in cases.of_this_package() if case.function is grpo.grpo]


def logps(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[:, None]


def exact() -> Tensor:
    """The gradient of BETA KL(policy || reference) with respect to the policy's logits."""
    logits = NOW.clone().requires_grad_()
    policy = logits.softmax(-1)
    (BETA * (policy * (policy.log() - START.log_softmax(-1))).sum()).backward()
    assert logits.grad is not None
    return logits.grad


def in_loss(settings: dict[str, Any], old: Tensor) -> Tensor:
    """The expectation over arms drawn from `old` of the gradient of a loss all of whose advantages are 0."""
    logits, zeros = NOW.clone().requires_grad_(), torch.zeros(ARMS, 1, dtype=torch.float64)
    policy = Rollouts(TokenLogps(logps(logits), ONE_TOKEN), logps(old), zeros, zeros[:, 0])
    loss = grpo.grpo(policy, TokenLogps(logps(START), ONE_TOKEN), **settings)
    (loss.values.reshape(ARMS) * old.softmax(-1)).sum().backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("case", OF_GRPO, ids=lambda case: case.name)
@pytest.mark.parametrize("old", [NOW, THEN], ids=["first pass", "later pass"])
def test_the_gradient_of_the_kl_in_a_loss_is_exact(old: Tensor, case: cases.Case, estimator: str) -> None:
    settings = {**case.hyperparameters, "beta": BETA, "kl_estimator": estimator}
    divisor = settings["max_tokens"] or 1
    torch.testing.assert_close(in_loss(settings, old) * divisor, exact(), rtol=1e-9, atol=1e-12)


def test_without_the_ratio_k1_has_no_gradient_and_k3_that_of_another_divergence() -> None:
    (case,) = (each for each in OF_GRPO if each.name == "grpo")
    bare = {**case.hyperparameters, "beta": BETA, "kl_ratio": False}
    assert in_loss({**bare, "kl_estimator": "k1"}, NOW).abs().max() < 1e-12
    off = in_loss({**bare, "kl_estimator": "k3"}, NOW)
    forward = BETA * (NOW.softmax(-1) - START.softmax(-1))  # of KL(reference || policy)
    torch.testing.assert_close(off, forward, rtol=1e-9, atol=1e-12)
    assert (off - exact()).norm() > 0.1 * exact().norm()
    torch.testing.assert_close(in_loss({**bare, "kl_estimator": "k2"}, NOW), exact(), rtol=1e-9, atol=1e-12)


def in_reward(estimator: Any) -> Tensor:
    """The expectation of the policy gradient of the KL as a penalty in the reward, on the first pass."""
    arms = Sampled(
        torch.zeros(ARMS, dtype=torch.float64), torch.arange(ARMS), TokenLogps(logps(NOW), ONE_TOKEN), logps(START), None
    )
    penalty = rewards_per_token(arms, arms.rewards, BETA, estimator)[:, 0]
    logits = NOW.clone().requires_grad_()
    (-(NOW.softmax(-1) * penalty * logits.log_softmax(-1)).sum()).backward()
    assert logits.grad is not None
    return logits.grad


def test_the_gradient_of_the_kl_in_a_reward_is_exact_with_k1_alone() -> None:
    torch.testing.assert_close(in_reward("k1"), exact(), rtol=1e-9, atol=1e-12)
    for estimator in ("k2", "k3"):
        assert (in_reward(estimator) - exact()).norm() > 0.1 * exact().norm()
    defaults = {case.name: case.settings for case in cases.of_this_package()}
    assert [defaults[name]["kl_estimator"] for name in ("ppo", "reinforce_plus_plus")] == ["k1", "k1"]


def test_rloos_penalty_is_the_sum_of_k1_over_a_completion() -> None:
    one = Sampled(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.long),
                  TokenLogps(torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[True, True], [True, False]])),
                  torch.tensor([[-1.5, -1.0], [-1.0, 0.0]]), None)  # fmt: skip
    advantages = rloo.advantages(one, beta=BETA).advantages
    # penalties -0.3 (0.5 - 1) and -0.3 (-2); each against the other
    torch.testing.assert_close(advantages[:, 0], torch.tensor([0.15 - 0.6, 0.6 - 0.15]))
