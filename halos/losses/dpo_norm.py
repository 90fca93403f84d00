"""Length-normalised DPO of Tulu 3."""

from typing import Annotated

from torch.nn.functional import logsigmoid

from halos.losses.common import pair_metrics
from halos.types import Loss, Pair, Range


def dpo_norm(policy: Pair, reference: Pair, *, beta: Annotated[float, Range(above=0)]) -> Loss:
    """-log sigmoid(beta (D_w / |w| - D_l / |l|)), D = log pi / pi_ref. Eq. 6 of arXiv:2411.15124."""
    chosen = beta * (policy.chosen.mean - reference.chosen.mean)
    rejected = beta * (policy.rejected.mean - reference.rejected.mean)
    return Loss(-logsigmoid(chosen - rejected), pair_metrics(policy, chosen, rejected))
