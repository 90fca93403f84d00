"""NCA: noise contrastive alignment of a pair, which keeps the likelihood of the chosen completion from falling."""

from typing import Annotated

from torch.nn.functional import logsigmoid

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Pair, Range


def nca(policy: Pair, reference: Pair, *, beta: Annotated[float, Range(above=0)]) -> Loss:
    """-log sigmoid(r_w) - 0.5 log sigmoid(-r_w) - 0.5 log sigmoid(-r_l), r = beta log pi / pi_ref: arXiv:2402.05369 for pairs."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    values = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    return Loss(values, pair_metrics(policy, chosen, rejected))
