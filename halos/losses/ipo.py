"""Identity Preference Optimization."""

from typing import Annotated, Literal

from halos.losses.common import pair_metrics
from halos.types import Loss, Pair, Range


def ipo(
    policy: Pair,
    reference: Pair,
    *,
    tau: Annotated[float, Range(above=0)],
    average: Literal["mean", "sum"],
) -> Loss:
    """(g - 1/(2 tau))^2, g the difference of log-ratios, averaged over tokens (`mean`) or summed. Eq. 17 of arXiv:2310.12036.

    `mean` divides by the number of scored tokens, never by the number of tokens whose log-ratio is not zero, which is 0 where
    policy == reference.
    """
    chosen = policy.chosen.sum - reference.chosen.sum
    rejected = policy.rejected.sum - reference.rejected.sum
    if average == "mean":
        chosen = chosen / policy.chosen.length.clamp(min=1)
        rejected = rejected / policy.rejected.length.clamp(min=1)
    values = (chosen - rejected - 1 / (2 * tau)) ** 2
    return Loss(values, pair_metrics(policy, tau * chosen, tau * rejected))
