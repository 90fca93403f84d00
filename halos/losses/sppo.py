"""SPPO: the log-ratios of a pair are regressed onto those of a game whose winner is known."""

from typing import Annotated

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Pair, Range


def sppo(policy: Pair, reference: Pair, *, beta: Annotated[float, Range(above=0)]) -> Loss:
    """(D_w - 1 / (2 beta))^2 + (D_l + 1 / (2 beta))^2, D = log pi / pi_ref. Eq. 4.7 of arXiv:2405.00675.

    With the win rate of the chosen completion taken as 1 (the hard labels); the paper estimates it by a preference model.
    """
    chosen, rejected = log_ratios(policy, reference)
    values = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return Loss(values, pair_metrics(policy, beta * chosen, beta * rejected))
