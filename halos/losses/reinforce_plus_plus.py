"""REINFORCE++: no critic, a KL penalty in every token's reward, returns whitened over the global batch."""

from typing import Annotated

import torch

from halos.losses.entropy import Coefficient, adapt_entropy, check, token_statistics, with_entropy  # noqa: F401
from halos.losses.rollouts import (
    KL,
    all_equal,
    clipped,
    is_clipped,
    log_ratio,
    mean_kl,
    of_group,
    report,
    rewards_per_token,
    whiten,
)
from halos.types import Estimates, Loss, Range, Rollouts, Sampled


def needs_reference(*, kl_coefficient: float) -> bool:
    return kl_coefficient > 0


def advantages(
    sampled: Sampled,
    *,
    kl_coefficient: Annotated[float, Range(least=0)],
    kl_estimator: KL,
    group_baseline: bool,
) -> Estimates:
    """A_t = whitened (r - kl_coefficient sum of KL_i over i >= t). arXiv:2501.03262.

    With `group_baseline` r is first taken relative to its group's mean, which that paper calls REINFORCE++-baseline.
    """
    rewards, mask = sampled.rewards, sampled.old.mask
    if group_baseline:
        rewards = rewards - of_group(rewards, sampled.groups)[0]
    given = rewards_per_token(sampled, rewards, kl_coefficient, kl_estimator)
    returns = torch.where(mask, given.flip(-1).cumsum(-1).flip(-1), 0.0)
    metrics = {"groups/all_equal": all_equal(sampled)}
    if sampled.reference is not None:
        metrics["kl"] = mean_kl(sampled)
    return Estimates(whiten(returns, mask).float(), None, metrics)


def reinforce_plus_plus(
    policy: Rollouts,
    *,
    clip_low: Annotated[float, Range(least=0)],
    clip_high: Annotated[float, Range(least=0)],
    dual_clip: Annotated[float | None, Range(above=1)],
    entropy_coefficient: Coefficient,
) -> Loss:
    """PPO's clipped objective; its denominator is the number of tokens in the global batch."""
    ratio = log_ratio(policy).exp()
    clip_acts = is_clipped(ratio, policy.advantages, clip_low, clip_high, dual_clip)
    values = clipped(ratio, policy.advantages, clip_low, clip_high, dual_clip) * policy.logps.mask
    return with_entropy(Loss(values, report(policy, clip_acts), per="token"), policy, entropy_coefficient)
