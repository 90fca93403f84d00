"""SimPO: the implicit reward is the average log-probability, so no reference model is needed."""

from typing import Annotated

from torch.nn.functional import logsigmoid

from halos.losses.common import pair_metrics
from halos.types import Loss, Pair, Range


def check(*, gamma: float | None, gamma_over_beta: float | None) -> str | None:
    """Both set the same margin, so exactly one of them must be null."""
    if (gamma is None) == (gamma_over_beta is None):
        return "give one of loss.gamma and loss.gamma_over_beta, and null for the other"
    return None


def simpo(
    policy: Pair,
    *,
    beta: Annotated[float, Range(above=0)],
    gamma: Annotated[float | None, Range(least=0)],
    gamma_over_beta: Annotated[float | None, Range(least=0)],
) -> Loss:
    """-log sigmoid(beta (mean log-prob of chosen - of rejected) - gamma). Eq. 6 of arXiv:2405.14734."""
    margin = beta * gamma_over_beta if gamma_over_beta is not None else gamma
    assert margin is not None, "check() lets no other case through"
    chosen, rejected = beta * policy.chosen.mean, beta * policy.rejected.mean
    return Loss(-logsigmoid(chosen - rejected - margin), pair_metrics(policy, chosen, rejected))
