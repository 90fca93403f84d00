"""The hinge loss of RSO and SLiC on implicit rewards."""

from typing import Annotated

from torch import relu

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Pair, Range


def hinge(policy: Pair, reference: Pair, *, beta: Annotated[float, Range(above=0)]) -> Loss:
    """max(0, 1 - beta h). Eq. 10 of arXiv:2309.06657 (RSO)."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return Loss(relu(1 - (chosen - rejected)), pair_metrics(policy, chosen, rejected))
