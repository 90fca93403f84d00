"""WPO: a pair counts as much as the policy is likely to give it."""

import numpy as np
import pytest
import torch

from halos.losses.dpo import dpo
from halos.losses.wpo import WeightedPair, wpo
from halos.types import TokenLogps

from .samples import POLICY, REFERENCE, H, gradients, number, numbers, pair, softplus


def weighted(padding: int = 0) -> WeightedPair:
    """The log of sum p^2 is half of each token's log-prob, and nonsense where nothing is scored."""

    def with_draws(side: TokenLogps) -> TokenLogps:
        values, mask = (torch.nn.functional.pad(part, (0, padding)) for part in (side.values.detach(), side.mask))
        return TokenLogps(values.requires_grad_(), mask, log_sum_squares=torch.where(mask, values.detach() / 2, 7.0))

    plain = pair(*POLICY)
    return WeightedPair(with_draws(plain.chosen), with_draws(plain.rejected))


# exp of half the mean log-prob of each completion
WEIGHTS = np.exp(np.array([-1.75 / 3, -1.25]) / 2) * np.exp(np.array([-0.875, -0.75]) / 2)


@pytest.mark.parametrize("padding", [0, 3])
def test_the_value_is_dpos_times_the_likelihoods_of_both_completions(padding: int):
    loss = wpo(weighted(padding), pair(*REFERENCE), beta=0.1)
    assert numbers(loss) == pytest.approx(WEIGHTS * softplus(-0.1 * H), abs=1e-6)
    assert numbers(loss) == pytest.approx([0.299494, 0.273848], abs=1e-6)
    assert number(loss.metrics["weights"]) == pytest.approx(WEIGHTS.mean(), abs=1e-6)


def test_the_weights_have_no_gradient():
    policy, plain = weighted(), pair(*POLICY)
    got = gradients(wpo(policy, pair(*REFERENCE), beta=0.1), policy.chosen.values, policy.rejected.values)
    of_dpo = gradients(dpo(plain, pair(*REFERENCE), beta=0.1), plain.chosen.values, plain.rejected.values)
    for mine, theirs in zip(got, of_dpo, strict=True):
        assert mine == pytest.approx(WEIGHTS[:, None] * theirs, abs=1e-7)
