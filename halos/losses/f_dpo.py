"""f-DPO: DPO whose reward is regularised by another divergence than the reverse KL."""

from typing import Annotated, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from halos.losses.common import log_ratios, pair_metrics
from halos.types import Loss, Pair, Range

LARGEST = 80.0  # exponent: float32 ends at exp(88.7)


def check(*, divergence: str, alpha: float | None) -> str | None:
    if (divergence == "alpha") != (alpha is not None):
        return "loss.alpha goes with loss.divergence=alpha: give both, or null and another divergence"
    return None


def _slope(ratio: Tensor, divergence: str, alpha: float | None) -> Tensor:
    """f'(u) at u = exp(ratio), up to a constant, which cancels in a pair: table 1 of the paper."""
    if divergence == "js":  # log(2 u / (1 + u))
        return logsigmoid(ratio)
    power = 1.0 if divergence == "forward_kl" else alpha
    assert power is not None, "check() lets no other case through"
    return -(-power * ratio).clamp(max=LARGEST).exp() / power  # -1 / u, or (1 - u^-alpha) / alpha


def f_dpo(
    policy: Pair,
    reference: Pair,
    *,
    beta: Annotated[float, Range(above=0)],
    divergence: Literal["forward_kl", "js", "alpha"],
    alpha: Annotated[float | None, Range(above=0, below=1)],
) -> Loss:
    """-log sigmoid(beta (f'(u_w) - f'(u_l))), u = pi / pi_ref of a completion. Theorem 1 and table 1 of arXiv:2309.16240.

    The reverse KL, f'(u) = log u + 1, is DPO, and the limit of the alpha-divergence as alpha falls to 0.
    """
    chosen, rejected = (beta * _slope(ratio, divergence, alpha) for ratio in log_ratios(policy, reference))
    return Loss(-logsigmoid(chosen - rejected), pair_metrics(policy, chosen, rejected))
