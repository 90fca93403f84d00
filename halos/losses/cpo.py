"""CPO: DPO's loss with a uniform reference, and cross-entropy on the chosen completion."""

from typing import Annotated

from torch.nn.functional import logsigmoid

from halos.losses.common import pair_metrics
from halos.types import Loss, Pair, Range


def cpo(policy: Pair, *, beta: Annotated[float, Range(above=0)], alpha: Annotated[float, Range(least=0)]) -> Loss:
    """-log sigmoid(beta (log pi(y_w) - log pi(y_l))) - alpha log pi(y_w) per token. Eq. 5 of arXiv:2401.08417.

    The first term is the mean over pairs, the second the mean over the chosen completions' tokens of the global batch.
    """
    chosen, rejected = beta * policy.chosen.sum, beta * policy.rejected.sum
    preference = Loss(-logsigmoid(chosen - rejected), pair_metrics(policy, chosen, rejected))
    return Loss.sum(preference=preference, nll=Loss(-alpha * policy.chosen.values, {}, per="chosen_token"))
