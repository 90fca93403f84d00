"""AOT, unpaired: the log-ratios of chosen and of rejected completions, each sorted over the whole global batch."""

from typing import Annotated

import torch
from torch import Tensor

from halos.losses.aot import cost_by_rank
from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Pair, Range


def statistics(policy: Pair, reference: Pair) -> Tensor:
    """log pi / pi_ref of the chosen and of the rejected completion: (rows, 2)."""
    return torch.stack(log_ratios(policy, reference), -1)


def aot_unpaired(
    policy: Pair,
    reference: Pair,
    statistics: Tensor,
    *,
    beta: Annotated[float, Range(above=0)],
    label_smoothing: Annotated[float, Range(least=0, most=0.5)],
) -> Loss:
    """-log sigmoid(beta (the i-th smallest log pi / pi_ref of the batch's chosen completions - of its rejected ones)): the
    unpaired form of arXiv:2406.05882, with smoothed labels."""
    chosen, rejected = log_ratios(policy, reference)
    of_chosen, of_rejected = statistics.unbind(-1)
    rises = cost_by_rank(chosen, of_chosen, of_rejected, slope=beta, label_smoothing=label_smoothing)
    falls = cost_by_rank(rejected, of_rejected, of_chosen, slope=-beta, label_smoothing=label_smoothing)
    # over the batch both sum to the same number: the value is that of one, the gradient is that of both
    values = rises + falls - falls.detach()
    return Loss(values, pair_metrics(policy, beta * chosen, beta * rejected))
