"""LD-DPO: DPO that weighs the tokens by which one completion is longer than the other less."""

from typing import Annotated

from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.losses.common import pair_metrics
from halos.types import Loss, Pair, Range, TokenLogps


def _weighted(completion: TokenLogps, shared: Tensor, alpha: float) -> Tensor:
    """The sum of log-probs, of which those after the first `shared` (rows,) scored tokens have the weight alpha: (rows,)."""
    beyond = completion.mask.cumsum(-1) > shared[:, None]
    return (completion.values * (1 - (1 - alpha) * beyond)).sum(-1)


def ld_dpo(
    policy: Pair, reference: Pair, *, beta: Annotated[float, Range(above=0)], alpha: Annotated[float, Range(least=0, most=1)]
) -> Loss:
    """DPO on log-probs, of policy and reference, whose tokens beyond the length of the pair's shorter completion have the weight
    alpha. Eq. 11 of arXiv:2409.06411; alpha = 1 is DPO."""
    shared = policy.chosen.length.minimum(policy.rejected.length)
    chosen, rejected = (
        beta * (_weighted(mine, shared, alpha) - _weighted(theirs, shared, alpha))
        for mine, theirs in ((policy.chosen, reference.chosen), (policy.rejected, reference.rejected))
    )
    return Loss(-logsigmoid(chosen - rejected), pair_metrics(policy, chosen, rejected))
