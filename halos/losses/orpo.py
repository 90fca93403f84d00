"""ORPO: cross-entropy on the chosen completion and a penalty on the odds ratio, without a reference model."""

import math
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.losses.common import pair_metrics
from halos.types import Loss, Mean, Pair, Range


def log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) of P = exp(logp): (rows,). Finite and accurate from P = 0 to 1, where float32 rounds logp to 0."""
    logp = logp.clamp(max=-(2.0**-24))
    # log(1 - P): by expm1 where P is near 1, by log1p elsewhere; each where it is accurate (M. Maechler's log1mexp)
    near_one = logp > -math.log(2)
    complement = torch.where(near_one, (-torch.where(near_one, logp, -1.0).expm1()).log(), (-logp.exp()).log1p())
    return logp - complement


def orpo(policy: Pair, *, weight: Annotated[float, Range(least=0)]) -> Loss:
    """-log pi(y_w) per token - lambda log sigmoid(log odds(y_w) - log odds(y_l)), P = exp(log pi(y) / |y|). Eq. 6 and 7 of
    arXiv:2403.07691, lambda = weight.

    The first term is the mean over the chosen completions' tokens of the global batch, the second the mean over pairs.
    """
    h = log_odds(policy.chosen.mean) - log_odds(policy.rejected.mean)
    chosen, rejected = weight * policy.chosen.mean, weight * policy.rejected.mean
    metrics = pair_metrics(policy, chosen, rejected) | {"log_odds_ratio": Mean.of(h)}
    return Loss.sum(nll=Loss(-policy.chosen.values, {}, per="chosen_token"), odds=Loss(-weight * logsigmoid(h), metrics))
