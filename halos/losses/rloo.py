"""REINFORCE leave-one-out: the baseline of a sample is the mean reward of the other samples of its prompt."""

from typing import Annotated

import torch
from torch import Tensor

from halos.losses.entropy import Coefficient, adapt_entropy, check, token_statistics, with_entropy  # noqa: F401
from halos.losses.rollouts import (
    LARGEST,
    all_equal,
    clipped,
    deviation,
    is_clipped,
    log_ratio,
    mean_kl,
    of_group,
    report,
    sequence_kl,
)
from halos.types import Estimates, Loss, Range, Rollouts, Sampled


def needs_reference(*, beta: float) -> bool:
    return beta > 0


def ratio_level() -> str:
    return "sequence"


def advantages(sampled: Sampled, *, beta: Annotated[float, Range(least=0)]) -> Estimates:
    """A_i = R_i - mean of the group's other R_j, with R = r - beta log pi_old / pi_ref of the whole completion.

    arXiv:2402.14740. The only completion of a prompt has no baseline: its advantage is 0. A masked sample has a reward and no
    divergence, so that the mean of the others' divergences is of those that have one.
    """
    divergence, learned = sequence_kl(sampled), sampled.old.mask.any(-1)
    if learned.all() or not learned.any():
        values = _above_others(sampled.rewards - beta * divergence, sampled.groups)
    else:
        values = _above_others(sampled.rewards, sampled.groups)
        values[learned] -= beta * _above_others(divergence[learned], sampled.groups[learned])
    metrics = {"groups/all_equal": all_equal(sampled), "advantages/std": deviation(values)}
    if sampled.reference is not None:
        metrics["kl"] = mean_kl(sampled)
    return Estimates(torch.where(sampled.old.mask, values.float()[:, None], 0.0), None, metrics)


def _above_others(values: Tensor, groups: Tensor) -> Tensor:
    """Each value minus the mean of the others of its group: (rows,)."""
    mean, _, sizes = of_group(values, groups)
    # which is (value - mean of all) n / (n - 1)
    return torch.where(sizes > 1, (values - mean) * sizes / (sizes - 1).clamp(min=1), 0.0)


def rloo(
    policy: Rollouts,
    *,
    clip_low: Annotated[float, Range(least=0)],
    clip_high: Annotated[float, Range(least=0)],
    dual_clip: Annotated[float | None, Range(above=1)],
    entropy_coefficient: Coefficient,
) -> Loss:
    """-min(r A, clip(r) A) with one ratio r for a whole completion; on the first pass its gradient is REINFORCE's."""
    ratio = log_ratio(policy).sum(-1, keepdim=True).clamp(-LARGEST, LARGEST).exp()  # (rows, 1)
    advantage = policy.advantages.gather(1, torch.zeros_like(ratio, dtype=torch.long))  # the same for all tokens of a row
    clip_acts = is_clipped(ratio, advantage, clip_low, clip_high, dual_clip)
    return with_entropy(
        Loss(clipped(ratio, advantage, clip_low, clip_high, dual_clip)[:, 0], report(policy, clip_acts)),
        policy,
        entropy_coefficient,
    )
