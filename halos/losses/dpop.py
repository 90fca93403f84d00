"""DPO-Positive: DPO with a penalty where the likelihood of the chosen completion falls below the reference's."""

from typing import Annotated

from torch import relu
from torch.nn.functional import logsigmoid

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Mean, Pair, Range


def dpop(
    policy: Pair, reference: Pair, *, beta: Annotated[float, Range(above=0)], penalty: Annotated[float, Range(least=0)]
) -> Loss:
    """-log sigmoid(beta (h - lambda max(0, -D_w))), D = log pi / pi_ref, lambda = penalty. Eq. 3 of arXiv:2402.13228."""
    chosen, rejected = log_ratios(policy, reference)
    fallen = relu(-chosen)
    metrics = pair_metrics(policy, beta * chosen, beta * rejected) | {"penalties": Mean.of(fallen)}
    return Loss(-logsigmoid(beta * (chosen - rejected - penalty * fallen)), metrics)
