"""BCO: completions and pairs against the running mean of rewards, by hand in float64 from D_w and D_l (samples.py)."""

import numpy as np
import pytest
import torch

from halos.losses.bco import bco, shift, start, update
from halos.losses.bco_pair import bco_pair
from halos.types import Labelled

from .samples import POLICY, REFERENCE, gradients, logps, number, numbers, pair, softplus

D_W, D_L = np.array([0.75, -0.75]), np.array([-0.75, 0.25])
STATE = {"chosen/sum": 1.5, "chosen/count": 5.0, "rejected/sum": -0.9, "rejected/count": 3.0}  # means .3 and -.3 ...
SHIFTED = {**STATE, "rejected/sum": -0.3}  # ... and .3 and -.1, so that d = .1


def labelled(rows: list[list[float]], desirable: list[bool]) -> Labelled:
    return Labelled(logps(rows), torch.tensor(desirable))


def test_a_pair_costs_both_of_its_classifications_against_the_shift() -> None:
    loss = bco_pair(pair(*POLICY), pair(*REFERENCE), SHIFTED, beta=0.2)
    assert numbers(loss) == pytest.approx(softplus(0.1 - 0.2 * D_W) + softplus(0.2 * D_L - 0.1), abs=1e-6)
    assert numbers(loss) == pytest.approx([1.244399, 1.494399], abs=1e-6)
    assert number(loss.metrics["rewards/shift"]) == pytest.approx(0.1)
    unshifted = bco_pair(pair(*POLICY), pair(*REFERENCE), start(), beta=0.2)
    assert numbers(unshifted) == pytest.approx(softplus(-0.2 * D_W) + softplus(0.2 * D_L), abs=1e-6)


def test_a_completion_is_classified_by_its_label() -> None:
    policy, reference = ([*one[0], *one[1]] for one in (POLICY, REFERENCE))
    labels = [True, True, False, False]
    loss = bco(labelled(policy, labels), labelled(reference, labels), SHIFTED, beta=0.2)
    expected = [*softplus(0.1 - 0.2 * D_W), *softplus(0.2 * D_L - 0.1)]
    assert numbers(loss) == pytest.approx(expected, abs=1e-6)
    both = bco_pair(pair(*POLICY), pair(*REFERENCE), SHIFTED, beta=0.2)
    assert numbers(loss).sum() == pytest.approx(numbers(both).sum(), abs=1e-6), "the same two classifications"


def test_at_the_reference_the_loss_is_ln_2_of_each_completion_and_moves_the_two_apart() -> None:
    policy = pair(*POLICY)
    loss = bco_pair(policy, pair(*POLICY), start(), beta=0.2)
    assert numbers(loss) == pytest.approx([2 * np.log(2)] * 2, abs=1e-6)
    chosen, rejected = gradients(loss, policy.chosen.values, policy.rejected.values)
    assert chosen[policy.chosen.mask] == pytest.approx(-0.1)
    assert rejected[policy.rejected.mask] == pytest.approx(0.1)


def test_the_shift_is_the_mean_of_the_two_classes_means_over_all_steps() -> None:
    """Rewards 2, 1 and -3 in one step, 0 and 1, 1, 1 in the next: means 1 and 0."""
    first = update(start(), {"rewards/chosen": (3.0, 2.0), "rewards/rejected": (-3.0, 1.0)}, decay=1.0)
    assert shift(start()) == 0
    assert shift(first) == (1.5 - 3.0) / 2
    second = update(first, {"rewards/chosen": (0.0, 1.0), "rewards/rejected": (3.0, 3.0), "loss": (9.0, 9.0)}, decay=1.0)
    assert shift(second) == pytest.approx((3 / 3 + 0 / 4) / 2)
    faded = update(first, {"rewards/chosen": (0.0, 1.0), "rewards/rejected": (3.0, 3.0)}, decay=0.5)
    assert shift(faded) == pytest.approx((1.5 / 2 + 1.5 / 3.5) / 2), "the earlier step counts half"


def test_a_class_that_is_absent_leaves_its_mean() -> None:
    only = update(start(), {"rewards/chosen": (3.0, 2.0)}, decay=1.0)
    assert shift(only) == 1.5
    assert shift(update(only, {"rewards/rejected": (1.0, 2.0)}, decay=1.0)) == (1.5 + 0.5) / 2
    assert bco(labelled([[-1.0]], [False]), labelled([[-2.0]], [False]), only, beta=1.0).values.item() == pytest.approx(
        float(softplus(1.0 - 1.5)), abs=1e-6
    )
