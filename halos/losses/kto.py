"""Kahneman-Tversky Optimization: learns from binary labels, without pairs."""

from typing import Annotated

from torch import Tensor, sigmoid, where

from halos.types import Labelled, Loss, Mean, Mismatched, Range


def statistics(policy: Mismatched, reference: Mismatched) -> Tensor:
    """log pi / pi_ref of each row's mismatched completion: (rows,). Its mean over the global batch estimates the KL."""
    return policy.completion.sum - reference.completion.sum


def kto(
    policy: Labelled,
    reference: Labelled,
    statistics: Tensor,
    *,
    beta: Annotated[float, Range(above=0)],
    desirable_weight: Annotated[float, Range(least=0)],
    undesirable_weight: Annotated[float, Range(least=0)],
) -> Loss:
    """w (1 - value): desirable 1 - sigmoid(beta (D - z0)), undesirable 1 - sigmoid(beta (z0 - D)). Eq. 8 of arXiv:2402.01306.

    z0 is the mean mismatched log-ratio of the whole global batch, clamped at 0 from below, without gradient. `statistics`
    holds those log-ratios: (items of the global batch,).
    """
    divergence = statistics.detach().mean()
    z0 = divergence.clamp(min=0)
    ratio = policy.completion.sum - reference.completion.sum
    good = policy.desirable
    values = where(
        good,
        desirable_weight * (1 - sigmoid(beta * (ratio - z0))),
        undesirable_weight * (1 - sigmoid(beta * (z0 - ratio))),
    )
    rewards, logps = beta * ratio, policy.completion.sum
    metrics = {
        "rewards/chosen": Mean.of(rewards, good),
        "rewards/rejected": Mean.of(rewards, ~good),
        "logps/chosen": Mean.of(logps, good),
        "logps/rejected": Mean.of(logps, ~good),
        "kl": Mean.of(divergence.expand(len(ratio))),  # as estimated, which may be below 0; the loss takes z0
        "z0": Mean.of(z0.expand(len(ratio))),
    }
    return Loss(values, metrics)
