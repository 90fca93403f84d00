"""Shared by the losses on sampled completions: ratios, KL estimators, advantages and metrics."""

from typing import Literal

import torch
from torch import Tensor

from halos.types import Mean, Rollouts, Sampled, ValuedRollouts

ROUNDING = 1e-12  # of float64 sums over a batch, relative
LARGEST = 20.0  # bound on a log-ratio before exp: e^20 is far beyond every clip, and finite

KL = Literal["k1", "k2", "k3"]


def log_ratio(policy: Rollouts | ValuedRollouts) -> Tensor:
    """log pi / pi_old of each token: (rows, time), 0 outside the mask."""
    return torch.where(policy.logps.mask, (policy.logps.values - policy.old).clamp(-LARGEST, LARGEST), 0.0)


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), and with `dual` at most -dual A where A < 0.

    Eq. 7 of arXiv:1707.06347, with separate bounds as in arXiv:2503.14476, and the dual clip of arXiv:1912.09729.
    """
    values = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return values if dual is None else torch.where(advantages < 0, torch.minimum(values, -dual * advantages), values)


def is_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    """Where the clip sets the gradient to zero."""
    acts = ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))
    return acts if dual is None else acts | ((ratio > dual) & (advantages < 0))


def kl(estimator: KL, policy: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from the log-probs of sampled tokens, token by token.

    With d = log pi / pi_ref: k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d (J. Schulman, Approximating KL Divergence, 2020).
    """
    difference = (policy - reference).clamp(-LARGEST, LARGEST)
    if estimator == "k1":
        return difference
    return difference**2 / 2 if estimator == "k2" else torch.expm1(-difference) + difference


def with_ratio(estimator: KL, divergence: Tensor, ratio: Tensor) -> Tensor:
    """An estimate of `kl` over samples of another policy, times pi / pi_old of each token (1 on the first pass).

    Its expectation over pi_old has the exact gradient of KL(policy || reference), which that of the bare estimate has not: k1's
    is 0, and k3's is that of the KL in the other direction (arXiv:2512.02556). The gradient of k2 is exact with the
    ratio as a constant.
    """
    return (ratio.detach() if estimator == "k2" else ratio) * divergence


def mean_over_time(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of each row over its tokens: (rows,)."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def report(policy: Rollouts | ValuedRollouts, clip_acts: Tensor) -> dict[str, Mean]:
    """Metrics of every loss on rollouts. `clip_acts` (rows, time) or (rows, 1) is true where the clip changes the gradient: PPO's
    sets it to zero (`is_clipped`), CISPO's bounds its factor.

    Without a bonus for it the entropy is estimated from the sampled tokens alone, without the logits of all others: the estimate
    is unbiased while the policy is still the one that sampled.
    """
    mask, entropy = policy.logps.mask, policy.logps.entropy
    return {
        "reward": Mean.of(policy.rewards),
        "clip_fraction": Mean.of(clip_acts.expand(mask.shape), mask),
        "approx_kl": Mean.of(log_ratio(policy) ** 2 / 2, mask),  # from the policy that sampled, not from the reference
        "entropy": Mean.of(-policy.logps.values if entropy is None else entropy, mask),
        "length": Mean.of(policy.logps.length, mask.any(-1)),  # of those that are learned from
    }


# --- building blocks of advantages -------------------------------------------------------------------------------------


def of_group(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of each row's group, sum of squares about it, and size of the group: (rows,) each, of the dtype of `rewards`."""
    _, group = groups.unique(return_inverse=True)
    zeros = rewards.new_zeros(int(group.max()) + 1)
    sizes = zeros.index_add(0, group, torch.ones_like(rewards))
    means = zeros.index_add(0, group, rewards) / sizes
    squares = zeros.index_add(0, group, (rewards - means[group]) ** 2)
    return means[group], squares[group], sizes[group]


def divided(values: Tensor, spread: Tensor, size: Tensor, epsilon: float) -> Tensor:
    """values / (spread + epsilon): (rows,). With an epsilon of 0, 0 where the spread of rewards of that `size` is rounding."""
    if epsilon > 0:
        return values / (spread + epsilon)
    return torch.where(spread > ROUNDING * size.abs(), values / spread, 0.0)


def all_equal(sampled: Sampled) -> Mean:
    """The fraction of groups whose rewards are all equal: they give no learning signal."""
    _, group = sampled.groups.unique(return_inverse=True)
    count = int(group.max()) + 1
    shape = sampled.rewards.new_zeros(count)
    least = shape.scatter_reduce(0, group, sampled.rewards, "amin", include_self=False)
    most = shape.scatter_reduce(0, group, sampled.rewards, "amax", include_self=False)
    return Mean.of(least == most)


def deviation(values: Tensor) -> Mean:
    """The standard deviation of values of a whole global batch; over several steps, the mean of the steps' deviations."""
    return Mean.of(values.std(correction=0))


def sequence_kl(sampled: Sampled) -> Tensor:
    """log pi_old / pi_ref of each completion, in nats, 0 where there is no reference: (rows,)."""
    if sampled.reference is None:
        return torch.zeros_like(sampled.rewards)
    return (sampled.old.values - sampled.reference).sum(-1).to(sampled.rewards.dtype)


def mean_kl(sampled: Sampled) -> Mean:
    """The mean of `sequence_kl` over the completions of which tokens are learned from: of a masked one it is not known."""
    return Mean.of(sequence_kl(sampled), sampled.old.mask.any(-1))


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(values - mean) / std over all tokens of the global batch; 0 outside the mask."""
    if not mask.any():  # all are masked
        return torch.zeros_like(values)
    inside = values[mask]
    return torch.where(mask, (values - inside.mean()) / (inside.std(correction=0) + 1e-8), 0.0)


def rewards_per_token(sampled: Sampled, rewards: Tensor, kl_coefficient: float, estimator: KL) -> Tensor:
    """-kl_coefficient KL_t at every token, plus the reward (rows,) at the last one: (rows, time)."""
    mask = sampled.old.mask
    given = torch.zeros(mask.shape, dtype=rewards.dtype, device=rewards.device)
    if sampled.reference is not None:
        given = given - kl_coefficient * kl(estimator, sampled.old.values, sampled.reference).to(rewards.dtype)
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    return torch.where(mask, given, 0.0) + torch.where(last, rewards[:, None], 0.0)
