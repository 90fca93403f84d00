"""EXO: the reverse KL between the policy's preference of a pair and the data's, which is smoothed."""

import math
from typing import Annotated

from torch import sigmoid
from torch.nn.functional import logsigmoid

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Pair, Range


def exo(
    policy: Pair,
    reference: Pair,
    *,
    beta: Annotated[float, Range(above=0)],
    label_smoothing: Annotated[float, Range(above=0, below=0.5)],
) -> Loss:
    """KL((sigmoid(beta h), sigmoid(-beta h)) || (1 - e, e)), e = label_smoothing. Eq. 16 of arXiv:2402.00856.

    At e = 0 it would be infinite, so that it takes e > 0.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    h = chosen - rejected
    wins = sigmoid(h) * (logsigmoid(h) - math.log1p(-label_smoothing))
    loses = sigmoid(-h) * (logsigmoid(-h) - math.log(label_smoothing))
    return Loss(wins + loses, pair_metrics(policy, chosen, rejected))
