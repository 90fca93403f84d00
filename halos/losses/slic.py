"""SLiC-HF: sequence likelihood calibration."""

from typing import Annotated, Literal

from torch import relu

from halos.losses.common import pair_metrics
from halos.types import Loss, Pair, Range


def slic(
    policy: Pair,
    *,
    delta: Annotated[float, Range(least=0)],
    regularization: Annotated[float, Range(least=0)],
    average: Literal["mean", "sum"],
) -> Loss:
    """max(0, delta - log pi(chosen) + log pi(rejected)) - lambda log pi(chosen). Eq. 1 of arXiv:2305.10425.

    The paper regularises towards the SFT target, which here is the chosen completion. Each term is one number for a pair.
    """
    chosen, rejected = policy.chosen.sum, policy.rejected.sum
    target = policy.chosen.mean if average == "mean" else chosen
    values = relu(delta - chosen + rejected) - regularization * target
    return Loss(values, pair_metrics(policy, chosen, rejected))
