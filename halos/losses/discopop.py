"""DiscoPOP: a blend of the logistic and the exponential loss, which a language model proposed."""

from typing import Annotated

from torch import sigmoid
from torch.nn.functional import logsigmoid

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Pair, Range


def discopop(
    policy: Pair, reference: Pair, *, beta: Annotated[float, Range(above=0)], tau: Annotated[float, Range(above=0, most=1)]
) -> Loss:
    """(1 - m) (-log sigmoid(beta h)) + m exp(-beta h), m = sigmoid(beta h / tau). Eq. 5 of arXiv:2406.08414.

    It is not convex: at h = 0 its slope is above 0, and it has a minimum on either side (the paper's appendix).
    m exp(-beta h) is formed from its logarithm: each factor alone overflows for a large -h, the product with tau <= 1 does not.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    h = chosen - rejected
    exponential = (logsigmoid(h / tau) - h).exp()
    return Loss(-sigmoid(-h / tau) * logsigmoid(h) + exponential, pair_metrics(policy, chosen, rejected))
