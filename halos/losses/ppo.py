"""Proximal Policy Optimization with a value head on the policy itself."""

from typing import Annotated

import torch
from torch import Tensor

from halos.losses.entropy import Coefficient, adapt_entropy, token_statistics, with_entropy  # noqa: F401
from halos.losses.entropy import check as check_entropy
from halos.losses.rollouts import KL, all_equal, clipped, is_clipped, log_ratio, mean_kl, report, rewards_per_token, whiten
from halos.types import Estimates, Loss, Mean, Range, Sampled, ValuedRollouts


def needs_reference(*, kl_coefficient: float) -> bool:
    return kl_coefficient > 0


def check(
    *,
    kl_coefficient: float,
    kl_target: float | None,
    entropy_coefficient: float,
    entropy_target: float | None,
    entropy_most: float,
) -> str | None:
    if kl_target is not None and kl_coefficient == 0:
        return (
            f"loss.kl_target={kl_target:g} is followed by a factor of loss.kl_coefficient, and 0 stays 0: give a coefficient"
            " above 0, or leave the target out"
        )
    return check_entropy(entropy_coefficient=entropy_coefficient, entropy_target=entropy_target, entropy_most=entropy_most)


def adapt(
    coefficient: float,
    divergence: float,
    items: int,
    *,
    kl_target: Annotated[float | None, Range(above=0)],
    kl_horizon: Annotated[int, Range(least=1)],
) -> float:
    """The KL coefficient for the next global batch, after one of `items` completions whose mean KL was `divergence` (nats per
    completion): beta (1 + clip(KL / target - 1, -0.2, 0.2) items / horizon), section 2.2 of arXiv:1909.08593. Fixed where the
    target is null.
    """
    if kl_target is None:
        return coefficient
    error = min(max(divergence / kl_target - 1, -0.2), 0.2)
    return coefficient * (1 + error * items / kl_horizon)


def advantages(
    sampled: Sampled,
    *,
    kl_coefficient: Annotated[float, Range(least=0)],
    kl_estimator: KL,
    gamma: Annotated[float, Range(least=0, most=1)],
    gae_lambda: Annotated[float, Range(least=0, most=1)],
) -> Estimates:
    """Generalized advantage estimation (eq. 16 of arXiv:1506.02438) over rewards with a KL penalty at every token, then whitened.

    Returns are the advantages before whitening plus the values. The value of the state after the last token is 0.
    """
    assert sampled.values is not None, "the loss takes ValuedRollouts"
    mask = sampled.old.mask
    rewards = rewards_per_token(sampled, sampled.rewards, kl_coefficient, kl_estimator)
    values = sampled.values.to(rewards.dtype)
    estimates, following = torch.zeros_like(rewards), torch.zeros_like(sampled.rewards)
    for t in reversed(range(mask.shape[1])):
        after = values[:, t + 1] * mask[:, t + 1] if t + 1 < mask.shape[1] else torch.zeros_like(following)
        surprise = rewards[:, t] + gamma * after - values[:, t]
        following = torch.where(mask[:, t], surprise + gamma * gae_lambda * following, 0.0)
        estimates[:, t] = following
    returns = torch.where(mask, estimates + values, 0.0)
    metrics = {"groups/all_equal": all_equal(sampled), "value/explained_variance": _explained(values, returns, mask)}
    if sampled.reference is not None:
        metrics["kl"] = mean_kl(sampled)
    return Estimates(whiten(estimates, mask).float(), returns.float(), metrics)


def _explained(values: Tensor, returns: Tensor, mask: Tensor) -> Mean:
    """1 - Var(returns - values) / Var(returns) over the tokens: 1 for a perfect critic, 0 for one that predicts only the mean."""
    if not mask.any():  # all are masked
        return Mean.of(returns[mask])
    of_returns = returns[mask].var(correction=0)
    left = (returns - values)[mask].var(correction=0)
    return Mean.of(1 - left / of_returns.clamp(min=1e-8))


def ppo(
    policy: ValuedRollouts,
    *,
    clip_low: Annotated[float, Range(least=0)],
    clip_high: Annotated[float, Range(least=0)],
    dual_clip: Annotated[float | None, Range(above=1)],
    value_clip: Annotated[float | None, Range(above=0)],
    value_coefficient: Annotated[float, Range(least=0)],
    entropy_coefficient: Coefficient,
) -> Loss:
    """The clipped objective (eq. 7 of arXiv:1707.06347) plus value_coefficient / 2 times the squared error of the value head.

    With `value_clip` the error is the larger of two: the value's, and that of the value clipped to within `value_clip` of the
    old value. The denominator of both terms is the number of tokens in the global batch.
    """
    ratio, mask = log_ratio(policy).exp(), policy.logps.mask
    clip_acts = is_clipped(ratio, policy.advantages, clip_low, clip_high, dual_clip)
    error = (policy.values - policy.returns) ** 2
    if value_clip is not None:
        near = policy.old_values + (policy.values - policy.old_values).clamp(-value_clip, value_clip)
        error = torch.maximum(error, (near - policy.returns) ** 2)
    objective = clipped(ratio, policy.advantages, clip_low, clip_high, dual_clip)
    metrics = report(policy, clip_acts)
    metrics |= {"value/loss": Mean.of(error / 2, mask), "value/mean": Mean.of(policy.values, mask)}
    loss = Loss((objective + value_coefficient * error / 2) * mask, metrics, per="token")
    return with_entropy(loss, policy, entropy_coefficient)
