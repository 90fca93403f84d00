"""KTO: each completion against the estimated KL of the whole global batch."""

import numpy as np
import pytest
import torch
from torch import Tensor

from halos.losses.kto import kto, statistics
from halos.types import Labelled, Loss, Mismatched

from .samples import add_up, gradients, logps, number, numbers, whole

POLICY = [[-0.5, -1.0, -0.25], [-2.0, -0.5], [-1.0, -0.75]]
REFERENCE = [[-1.0, -1.0, -0.5], [-1.5, -0.25], [-0.5, -0.5]]
RATIO = np.array([0.75, -0.75, -0.75])
LABELS = [True, True, False]
SETTINGS = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}


def sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


def run(labels: list[bool] = LABELS, mismatched: Tensor | None = None, **settings: float) -> Loss:
    mismatched = torch.zeros(3) if mismatched is None else mismatched
    desirable = torch.tensor(labels)
    return kto(Labelled(logps(POLICY), desirable), Labelled(logps(REFERENCE), desirable), mismatched, **{**SETTINGS, **settings})


def test_the_value_is_the_one_worked_by_hand():
    """z0 = mean(3, -1, 4) = 2."""
    loss = run(mismatched=torch.tensor([3.0, -1.0, 4.0]), beta=0.5, desirable_weight=1.5, undesirable_weight=0.75)
    value = sigmoid(0.5 * np.array([0.75 - 2, -0.75 - 2, 2 + 0.75]))
    assert numbers(loss) == pytest.approx((1 - value) * [1.5, 1.5, 0.75], abs=1e-6)
    assert numbers(loss) == pytest.approx([0.977032, 1.197280, 0.151360], abs=1e-6)


def test_a_policy_that_equals_its_reference_costs_half_of_the_weights():
    labels = torch.tensor(LABELS)
    same = Labelled(logps(POLICY), labels)
    loss = kto(same, same, torch.zeros(3), beta=0.1, desirable_weight=1.0, undesirable_weight=1.3)
    assert numbers(loss) == pytest.approx([0.5, 0.5, 0.65], abs=1e-6)


def test_desirable_tokens_are_pushed_up_and_undesirable_ones_down():
    labels, policy = torch.tensor(LABELS), logps(POLICY)
    loss = kto(Labelled(policy, labels), Labelled(logps(REFERENCE), labels), torch.tensor([1.0]), **SETTINGS)
    (gradient,) = gradients(loss, policy.values)
    slope = sigmoid(0.1 * (RATIO - 1))
    slope = 0.1 * slope * (1 - slope) * [-1, -1, 1]
    assert gradient[policy.mask] == pytest.approx(np.repeat(slope, [3, 2, 2]), abs=1e-7)


def test_changing_a_label_mirrors_the_value():
    """1 - s(z) and 1 - s(-z) add up to 1."""
    there = run(mismatched=torch.tensor([1.0]))
    back = run([not label for label in LABELS], mismatched=torch.tensor([1.0]))
    assert numbers(there) + numbers(back) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("mismatched", "z0"), [([-3.0, -1.0], 0.0), ([-3.0, 5.0], 1.0), ([2.0, 4.0], 3.0)])
def test_z0_is_clamped_after_the_mean_and_not_before(mismatched: list[float], z0: float):
    loss = run(mismatched=torch.tensor(mismatched))
    assert number(loss.metrics["z0"]) == pytest.approx(z0)
    assert number(loss.metrics["kl"]) == pytest.approx(sum(mismatched) / 2)
    assert numbers(loss)[0] == pytest.approx(1 - sigmoid(0.1 * (0.75 - z0)), abs=1e-6)


def test_z0_has_no_gradient_even_where_its_log_ratios_were_made_with_one():
    mismatched = torch.tensor([3.0, 1.0], requires_grad=True)
    loss = run(mismatched=mismatched)
    (gradient,) = torch.autograd.grad(loss.values.sum(), mismatched, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_statistics_are_the_log_ratios_of_the_mismatched_completions():
    ratios = statistics(Mismatched(logps(POLICY)), Mismatched(logps(REFERENCE)))
    assert ratios.detach().numpy() == pytest.approx(RATIO, abs=1e-6)


def test_z0_of_the_global_batch_makes_micro_batches_exact_and_z0_of_each_does_not():
    labels, mismatched = torch.tensor(LABELS), torch.tensor([6.0, 0.0, 3.0])

    def parts(own_statistics: bool) -> list[Loss]:
        return [
            kto(
                Labelled(logps(POLICY[i : i + 1]), labels[i : i + 1]),
                Labelled(logps(REFERENCE[i : i + 1]), labels[i : i + 1]),
                mismatched[i : i + 1] if own_statistics else mismatched,
                **SETTINGS,
            )
            for i in range(3)
        ]

    whole_batch = run(mismatched=mismatched)
    exact, local = parts(own_statistics=False), parts(own_statistics=True)
    assert np.concatenate([numbers(part) for part in exact]) == pytest.approx(numbers(whole_batch), abs=1e-7)
    assert add_up(exact) == {k: pytest.approx((v.total.item(), v.count.item())) for k, v in whole_batch.metrics.items()}
    assert np.abs(np.concatenate([numbers(part) for part in local]) - numbers(whole_batch)).max() > 0.05


def test_a_micro_batch_of_one_is_not_measured_against_its_own_reward():
    """HALOs pairs the example with itself there: z0 is its own log-ratio, and the value is always one half."""
    desirable = torch.tensor([True])
    loss = kto(Labelled(whole(-1.0), desirable), Labelled(whole(-3.0), desirable), torch.tensor([0.5, 0.1]), **SETTINGS)
    assert numbers(loss) == pytest.approx([1 - sigmoid(0.1 * (2.0 - 0.3))], abs=1e-6)


@pytest.mark.parametrize("desirable", [True, False])
def test_a_class_that_is_absent_gives_zero_and_not_nan(desirable: bool):
    """trl#1447, OpenRLHF#326. Every rank reports every key, so that all make the same collectives."""
    both, one = run(), run([desirable] * 3)
    absent = "rejected" if desirable else "chosen"
    assert one.metrics.keys() == both.metrics.keys()
    assert np.isfinite(numbers(one)).all()
    for name in (f"rewards/{absent}", f"logps/{absent}"):
        assert (one.metrics[name].total.item(), one.metrics[name].count.item()) == (0, 0)
    assert all(np.isfinite(mean.total.item()) for mean in one.metrics.values())


@pytest.mark.parametrize("desirable", [True, False])
def test_a_class_that_is_absent_leaves_the_gradient_finite(desirable: bool):
    policy, labels = whole(-1.0, -5e4), torch.tensor([desirable] * 2)
    loss = kto(Labelled(policy, labels), Labelled(whole(-5e4, -1.0), labels), torch.zeros(2), **SETTINGS)
    (gradient,) = gradients(loss, policy.values)
    assert np.isfinite(gradient).all()


def test_metrics_are_the_ones_worked_by_hand():
    metrics = {k: number(v) for k, v in run(mismatched=torch.tensor([3.0, 1.0])).metrics.items()}
    expected = {"rewards/chosen": 0.0, "rewards/rejected": -0.075, "logps/chosen": -2.125, "logps/rejected": -1.75, "kl": 2.0}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_kl_is_one_number_of_the_batch_and_not_a_sum_over_micro_batches():
    assert add_up([run(mismatched=torch.tensor([2.0])) for _ in range(4)])["kl"] == pytest.approx((24.0, 12.0))


def test_weights_scale_their_own_class_only():
    plain, weighted = run(), run(desirable_weight=3.0, undesirable_weight=0.0)
    assert numbers(weighted) == pytest.approx(numbers(plain) * [3, 3, 0], abs=1e-6)
