"""APO-down: both completions are lowered below the reference, the rejected one further."""

from typing import Annotated

from torch import sigmoid

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Pair, Range


def apo_down(policy: Pair, reference: Pair, *, beta: Annotated[float, Range(above=0)]) -> Loss:
    """sigmoid(r_w) + (1 - sigmoid(r_w - r_l)), r = beta log pi / pi_ref. Eq. 8 of arXiv:2408.06266."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return Loss(sigmoid(chosen) + sigmoid(rejected - chosen), pair_metrics(policy, chosen, rejected))
