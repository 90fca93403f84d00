"""APO-zero: the chosen completion is raised above the reference, and the rejected one lowered below it."""

from typing import Annotated

from torch import sigmoid

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Pair, Range


def apo_zero(policy: Pair, reference: Pair, *, beta: Annotated[float, Range(above=0)]) -> Loss:
    """(1 - sigmoid(r_w)) + sigmoid(r_l), r = beta log pi / pi_ref. Eq. 7 of arXiv:2408.06266."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return Loss(sigmoid(-chosen) + sigmoid(rejected), pair_metrics(policy, chosen, rejected))
