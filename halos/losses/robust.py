"""Robust DPO: an unbiased estimate of DPO's loss from preferences that are flipped with a known probability."""

from typing import Annotated

from torch.nn.functional import logsigmoid

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Pair, Range


def robust(
    policy: Pair,
    reference: Pair,
    *,
    beta: Annotated[float, Range(above=0)],
    label_smoothing: Annotated[float, Range(least=0, below=0.5)],
) -> Loss:
    """(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e), e = label_smoothing. Eq. 12 of arXiv:2403.00409.

    Unlike cdpo's it has no lower bound: the flipped term is subtracted.
    """
    chosen, rejected = log_ratios(policy, reference)
    h, e = beta * (chosen - rejected), label_smoothing
    values = (-(1 - e) * logsigmoid(h) + e * logsigmoid(-h)) / (1 - 2 * e)
    return Loss(values, pair_metrics(policy, beta * chosen, beta * rejected))
