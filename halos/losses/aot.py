"""AOT, paired: alignment by optimal transport between preferences sorted over the whole global batch."""

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Pair, Range


def statistics(policy: Pair, reference: Pair) -> Tensor:
    """log pi(y_w) / pi(y_l) under the policy and under the reference: (rows, 2)."""
    return torch.stack([pair.chosen.sum - pair.rejected.sum for pair in (policy, reference)], -1)


def cost_by_rank(values: Tensor, own: Tensor, others: Tensor, *, slope: float, label_smoothing: float) -> Tensor:
    """The smoothed logistic loss of slope * (value - the one of `others` with its rank): (rows,).

    values: (rows,), some of `own`; own, others: (items,) of the global batch. Equal values share the ranks that they have
    together.
    """
    ordered, end = own.sort().values, len(own) - 1
    first = torch.searchsorted(ordered, values.detach()).clamp(max=end)
    last = torch.searchsorted(ordered, values.detach(), right=True).maximum(first + 1)
    ranks = torch.arange(len(own), device=own.device)
    weights = ((first[:, None] <= ranks) & (ranks < last[:, None])).float()
    margins = slope * (values[:, None] - others.sort().values)
    costs = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    return (weights * costs).sum(-1) / weights.sum(-1)


def aot(
    policy: Pair,
    reference: Pair,
    statistics: Tensor,
    *,
    beta: Annotated[float, Range(above=0)],
    label_smoothing: Annotated[float, Range(least=0, most=0.5)],
) -> Loss:
    """-log sigmoid(beta (the i-th smallest log pi(y_w) / pi(y_l) of the batch - the i-th smallest under the reference)): the
    paired form of arXiv:2406.05882, with smoothed labels."""
    chosen, rejected = log_ratios(policy, reference)
    preference, (own, others) = policy.chosen.sum - policy.rejected.sum, statistics.unbind(-1)
    values = cost_by_rank(preference, own, others, slope=beta, label_smoothing=label_smoothing)
    return Loss(values, pair_metrics(policy, beta * chosen, beta * rejected))
