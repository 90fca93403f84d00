"""WPO: DPO whose pairs are weighed by how likely the policy itself is to give them."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Mean, Pair, Range, TokenLogps


@dataclass(frozen=True, slots=True)
class WeightedPair(Pair):
    """A pair with, for each scored token, the log of the probability that two draws of the policy are equal."""

    token_statistics = ("log_sum_squares",)


def _likelihood(completion: TokenLogps) -> Tensor:
    """exp of the mean over tokens of log pi - log(sum p^2), without gradient: (rows,)."""
    assert completion.log_sum_squares is not None, "declared in token_statistics"
    aligned = (completion.values - completion.log_sum_squares) * completion.mask
    return (aligned.sum(-1) / completion.length.clamp(min=1)).detach().exp()


def wpo(policy: WeightedPair, reference: Pair, *, beta: Annotated[float, Range(above=0)]) -> Loss:
    """-w(y_w) w(y_l) log sigmoid(beta h), w = exp(mean over tokens of log pi(y_t) - log sum_v pi(v)^2). Eq. 2 and 4 of
    arXiv:2406.11827, whose weights are aligned with what the policy samples."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    weights = _likelihood(policy.chosen) * _likelihood(policy.rejected)
    metrics = pair_metrics(policy, chosen, rejected) | {"weights": Mean.of(weights)}
    return Loss(-weights * logsigmoid(chosen - rejected), metrics)
