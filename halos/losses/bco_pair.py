"""BCO on pairs: both completions are classified, against one running mean of their implicit rewards."""

from collections.abc import Mapping
from typing import Annotated

from torch.nn.functional import logsigmoid

from halos.losses.bco import shift
from halos.losses.bco import start as start
from halos.losses.bco import update as update
from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Mean, Pair, Range


def bco_pair(policy: Pair, reference: Pair, state: Mapping[str, float], *, beta: Annotated[float, Range(above=0)]) -> Loss:
    """-log sigmoid(r_w - d) - log sigmoid(d - r_l), of arXiv:2404.04656; r = beta log pi / pi_ref, d the mean over earlier steps.

    d has no gradient.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    d = shift(state)
    metrics = pair_metrics(policy, chosen, rejected) | {"rewards/shift": Mean.of(chosen.new_full(chosen.shape, d))}
    return Loss(-logsigmoid(chosen - d) - logsigmoid(d - rejected), metrics)
