"""The entropy bonus of the losses on rollouts, and the law by which its coefficient follows a target."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from halos.losses.entropy import adapt_entropy, check, token_statistics
from halos.losses.grpo import grpo
from halos.losses.ppo import ppo
from halos.losses.reinforce_plus_plus import reinforce_plus_plus
from halos.losses.rloo import rloo
from halos.types import Loss, Rollouts, TokenLogps, ValuedRollouts

from .rollouts import MASK, padded, rollouts
from .samples import number, numbers
from .test_grpo import PLAIN

ENTROPY = [[1.0, 0.5, 2.0], [0.25, 1.5]]  # 5.25 in all
BOUNDS = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}


def _grpo(given: Rollouts, **settings: Any) -> Loss:
    return grpo(given, None, **{**PLAIN, **settings})


def _ppo(given: Rollouts, **settings: Any) -> Loss:
    zeros = torch.zeros(2, 3)
    whole = ValuedRollouts(given.logps, given.old, given.advantages, given.rewards, zeros, zeros, zeros)
    return ppo(whole, value_clip=None, value_coefficient=0.1, **BOUNDS, **settings)


def of_distributions(padding: int = 0) -> tuple[Rollouts, torch.Tensor]:
    """Rollouts with the entropy of every token, which takes a gradient; nonsense beyond the end of a row."""
    plain, entropy = rollouts([1.0, -0.5]), torch.where(torch.from_numpy(MASK), padded(ENTROPY), 7.0).requires_grad_()
    wide = [torch.nn.functional.pad(part, (0, padding)) for part in (plain.logps.values, plain.logps.mask, plain.old)]
    spread = torch.nn.functional.pad(plain.advantages, (0, padding))
    known = torch.nn.functional.pad(entropy, (0, padding), value=7.0)
    return replace(plain, logps=TokenLogps(wide[0], wide[1], entropy=known), old=wide[2], advantages=spread), entropy


@pytest.mark.parametrize("loss", [_grpo, lambda given, **more: rloo(given, **BOUNDS, **more),
                                  lambda given, **more: reinforce_plus_plus(given, **BOUNDS, **more), _ppo],
                         ids=["grpo", "rloo", "reinforce_plus_plus", "ppo"])  # fmt: skip
def test_the_bonus_is_the_mean_over_the_tokens_of_the_batch_whatever_the_loss_divides_by(loss: Callable[..., Loss]) -> None:
    given, entropy = of_distributions()
    found, plain = loss(given, entropy_coefficient=0.1), loss(rollouts([1.0, -0.5]), entropy_coefficient=0.1)
    policy, bonus = found.parts["policy"], found.parts["entropy"]
    assert (policy.per, bonus.per) == (plain.per, "token")
    np.testing.assert_array_equal(numbers(policy), numbers(plain))
    np.testing.assert_allclose(numbers(bonus), -0.1 * padded(ENTROPY).double().numpy(), rtol=1e-6)
    assert bonus.values.sum().item() / 5 == pytest.approx(-0.1 * 5.25 / 5, rel=1e-6)
    (gradient,) = torch.autograd.grad(bonus.values.sum() / 5, entropy)
    np.testing.assert_allclose(gradient, -0.1 / 5 * MASK, rtol=1e-6)
    assert number(found.metrics["entropy"]) == pytest.approx(5.25 / 5, rel=1e-6), "exact, where it is read"
    assert number(plain.metrics["entropy"]) == pytest.approx((0.5 + 1.0 + 0.25 + 2.0 + 0.5) / 5), "of the sampled tokens"


def test_padding_adds_nothing_to_the_bonus() -> None:
    narrow, wide = (_grpo(of_distributions(padding)[0], entropy_coefficient=0.1).parts["entropy"] for padding in (0, 3))
    assert torch.equal(wide.values[:, :3], narrow.values)
    assert not wide.values[:, 3:].any()


def test_the_entropy_is_read_only_for_a_bonus() -> None:
    assert token_statistics(entropy_coefficient=0.0, entropy_target=None) == ()
    assert token_statistics(entropy_coefficient=0.1, entropy_target=None) == ("entropy",)
    assert token_statistics(entropy_coefficient=0.0, entropy_target=2.0) == ("entropy",)


def test_the_coefficient_rises_up_to_the_target_and_falls_above_it_within_its_bounds() -> None:
    law = {"entropy_target": 2.0, "entropy_step": 0.25, "entropy_most": 0.6}
    assert adapt_entropy(0.1, 1.9, **law) == adapt_entropy(0.1, 2.0, **law) == pytest.approx(0.35)
    assert adapt_entropy(0.5, 1.0, **law) == 0.6
    assert adapt_entropy(0.5, 2.1, **law) == 0.25
    assert adapt_entropy(0.1, 2.1, **law) == 0.0
    assert adapt_entropy(0.1, 0.0, **{**law, "entropy_target": None}) == 0.1
    assert check(entropy_coefficient=0.6, entropy_target=2.0, entropy_most=0.6) is None
    assert "above loss.entropy_most=0.6" in str(check(entropy_coefficient=0.7, entropy_target=2.0, entropy_most=0.6))
