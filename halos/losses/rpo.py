"""Iterative reasoning preference optimization: DPO anchored by the likelihood of the chosen completion."""

from typing import Annotated

from torch.nn.functional import logsigmoid

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Mean, Pair, Range


def rpo(
    policy: Pair, reference: Pair, *, beta: Annotated[float, Range(above=0)], alpha: Annotated[float, Range(least=0)]
) -> Loss:
    """-log sigmoid(beta h) - alpha log pi(y_w) / |y_w|. Eq. 1 of arXiv:2404.19733."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    anchor = -policy.chosen.mean
    metrics = pair_metrics(policy, chosen, rejected) | {"anchors": Mean.of(anchor)}
    return Loss(-logsigmoid(chosen - rejected) + alpha * anchor, metrics)
