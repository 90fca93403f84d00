"""Direct Preference Optimization."""

from typing import Annotated

from torch.nn.functional import logsigmoid

from halos.losses.common import pair_metrics
from halos.types import Loss, Pair, Range


def dpo(policy: Pair, reference: Pair, *, beta: Annotated[float, Range(above=0)]) -> Loss:
    """-log sigmoid(beta h), h = log-ratio of chosen minus log-ratio of rejected. Eq. 7 of arXiv:2305.18290."""
    chosen = beta * (policy.chosen.sum - reference.chosen.sum)
    rejected = beta * (policy.rejected.sum - reference.rejected.sum)
    return Loss(-logsigmoid(chosen - rejected), pair_metrics(policy, chosen, rejected))
