"""Conservative DPO: preference labels that are flipped with a known probability."""

from typing import Annotated

from torch.nn.functional import logsigmoid

from halos.losses.common import pair_metrics
from halos.types import Loss, Pair, Range


def cdpo(
    policy: Pair,
    reference: Pair,
    *,
    beta: Annotated[float, Range(above=0)],
    label_smoothing: Annotated[float, Range(least=0, most=0.5)],
) -> Loss:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), with e = `label_smoothing`; minimal where sigmoid(beta h) = 1 - e.

    E. Mitchell, "A note on DPO with noisy preferences and relationship to IPO" (2023), eq. 3.
    """
    chosen = beta * (policy.chosen.sum - reference.chosen.sum)
    rejected = beta * (policy.rejected.sum - reference.rejected.sum)
    margin = chosen - rejected
    values = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return Loss(values, pair_metrics(policy, chosen, rejected))
