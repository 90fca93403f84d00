"""Conservative DPO: cross-entropy against preferences that are flipped with a known probability."""

from typing import get_type_hints

import numpy as np
import pytest

from halos.losses.cdpo import cdpo
from halos.losses.dpo import dpo
from halos.types import Range

from .samples import POLICY, REFERENCE, H, gradients, margins, number, numbers, pair, softplus


def test_the_value_is_the_one_worked_by_hand():
    loss = cdpo(pair(*POLICY), pair(*REFERENCE), beta=0.1, label_smoothing=0.2)
    assert numbers(loss) == pytest.approx(0.8 * softplus(-0.1 * H) + 0.2 * softplus(0.1 * H), abs=1e-6)
    assert numbers(loss) == pytest.approx([0.650957, 0.724397], abs=1e-6)


def test_a_policy_that_equals_its_reference_costs_ln_2():
    loss = cdpo(pair(*POLICY), pair(*POLICY), beta=0.1, label_smoothing=0.2)
    assert numbers(loss) == pytest.approx(np.log(2), abs=1e-6)


def test_without_smoothing_it_is_dpo():
    plain = dpo(pair(*POLICY), pair(*REFERENCE), beta=0.3)
    smoothed = cdpo(pair(*POLICY), pair(*REFERENCE), beta=0.3, label_smoothing=0.0)
    assert numbers(smoothed) == pytest.approx(numbers(plain), abs=1e-7)
    assert {k: number(v) for k, v in smoothed.metrics.items()} == {k: number(v) for k, v in plain.metrics.items()}


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4])
def test_it_is_minimal_where_the_model_is_as_sure_as_the_labels_are(rate: float):
    """sigmoid(beta h) = 1 - e: the gradient is 0 there, the value is the entropy of e, and the sign turns beyond it."""
    best = np.log((1 - rate) / rate) / 0.1
    policy, reference = margins(best - 1, best, best + 1)
    loss = cdpo(policy, reference, beta=0.1, label_smoothing=rate)
    chosen, rejected = gradients(loss, policy.chosen.values, policy.rejected.values)
    assert (np.sign(chosen[[0, 2], 0]) == [-1, 1]).all()
    assert (np.sign(rejected[[0, 2], 0]) == [1, -1]).all()
    assert chosen[1, 0] == pytest.approx(0, abs=1e-6)
    assert rejected[1, 0] == pytest.approx(0, abs=1e-6)
    assert numbers(loss)[1] == pytest.approx(-(1 - rate) * np.log(1 - rate) - rate * np.log(rate), abs=1e-6)


def test_it_is_never_below_the_entropy_of_the_flip_rate_unlike_robust_dpo():
    policy, reference = margins(*np.linspace(-200, 200, 41))
    entropy = -0.8 * np.log(0.8) - 0.2 * np.log(0.2)
    assert numbers(cdpo(policy, reference, beta=0.1, label_smoothing=0.2)).min() >= entropy - 1e-6


def test_swapping_chosen_and_rejected_adds_the_margin_less_what_is_smoothed_away():
    there = cdpo(pair(*POLICY), pair(*REFERENCE), beta=0.1, label_smoothing=0.2)
    back = cdpo(pair(*reversed(POLICY)), pair(*reversed(REFERENCE)), beta=0.1, label_smoothing=0.2)
    assert numbers(back) - numbers(there) == pytest.approx((1 - 2 * 0.2) * 0.1 * H, abs=1e-6)


def test_with_half_of_the_labels_flipped_nothing_is_left_to_learn_from_their_order():
    there = cdpo(pair(*POLICY), pair(*REFERENCE), beta=0.1, label_smoothing=0.5)
    back = cdpo(pair(*reversed(POLICY)), pair(*reversed(REFERENCE)), beta=0.1, label_smoothing=0.5)
    assert numbers(there) == pytest.approx(numbers(back), abs=1e-6)


@pytest.mark.parametrize(("value", "complaint"), [(0.0, None), (0.5, None), (0.51, "most 0.5"), (-0.1, "least 0")])
def test_a_flip_rate_above_one_half_is_refused(value: float, complaint: str | None):
    (limits,) = get_type_hints(cdpo, include_extras=True)["label_smoothing"].__metadata__
    said = limits.violated_by(value)
    assert said is None if complaint is None else complaint in said


def test_a_range_can_leave_its_bound_out_as_robust_dpo_needs():
    """Robust DPO divides by 1 - 2e, so one half itself is refused."""
    rate = Range(least=0, below=0.5)
    assert [rate.violated_by(x) is None for x in (-0.01, 0.0, 0.49, 0.5, float("nan"))] == [False, True, True, False, False]
    assert rate.violated_by(0.5) == "at least 0 and below 0.5"


def test_a_strict_lower_bound_refuses_the_bound():
    assert Range(above=0).violated_by(0) == "above 0"
    assert Range(above=0).violated_by(1e-9) is None
    assert Range().violated_by(-1e9) is None
