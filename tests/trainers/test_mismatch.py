"""Importance weights for what the sampler computes otherwise, against numbers worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from halos.trainers import mismatch
from halos.trainers.mismatch import Correction
from halos.types import Mean

MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
RATIOS = torch.tensor([[2.0, 0.5, 3.0], [0.25, 1.0, 9.0], [1.0, 9.0, 9.0]])  # pi_trainer / pi_sampler; the last row's is unknown
SAMPLED = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.0, 0.0], [math.nan, 0.0, 0.0]])
OLD = torch.where(SAMPLED.isnan(), -1.0, SAMPLED + RATIOS.log())
ADVANTAGES = torch.tensor([[1.0], [-2.0], [4.0]]) * MASK


def weighed(kind: str, level: str, cap: float = 2.0) -> tuple[Tensor, dict[str, float]]:
    advantages, metrics = Correction(kind, level, cap).weigh(ADVANTAGES, OLD, SAMPLED, MASK)
    return advantages, {name: value(mean) for name, mean in metrics.items()}


def value(mean: Mean) -> float:
    return (mean.total / mean.count).item()


@pytest.mark.parametrize(
    ("kind", "level", "weights", "bounded"),
    [
        ("truncate", "token", [[2.0, 0.5, 2.0], [0.25, 1.0, 0.0], [1.0, 0.0, 0.0]], 1 / 5),
        ("mask", "token", [[2.0, 0.5, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], 2 / 5),
        ("truncate", "sequence", [[2.0, 2.0, 2.0], [0.25, 0.25, 0.0], [1.0, 0.0, 0.0]], 1 / 2),
        ("mask", "sequence", [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 1.0),
    ],
)
def test_advantages_are_weighed_by_a_bounded_ratio(kind: str, level: str, weights: list[list[float]], bounded: float) -> None:
    # an epsilon above the cap of 2, which rounding may pass
    advantages, metrics = weighed(kind, level, 2.0 + 1e-6)
    torch.testing.assert_close(advantages, ADVANTAGES * torch.tensor(weights), rtol=1e-5, atol=1e-6)
    assert metrics["mismatch/bounded"] == pytest.approx(bounded)


def test_without_a_correction_the_mismatch_is_measured_alone() -> None:
    advantages, metrics = weighed("none", "token")
    assert torch.equal(advantages, ADVANTAGES)
    logs = [abs(math.log(ratio)) for ratio in (2, 0.5, 3, 0.25, 1)]
    assert metrics["mismatch/mean"] == pytest.approx(sum(logs) / 5, rel=1e-6)
    assert mismatch.largest(OLD, SAMPLED, MASK).item() == pytest.approx(math.log(4), rel=1e-6)
    ratios = [2, 0.5, 3, 0.25, 1]
    ess = sum(ratios) ** 2 / (5 * sum(ratio**2 for ratio in ratios))
    assert mismatch.derived(metrics)["mismatch/ess"] == pytest.approx(ess, rel=1e-6)
    assert "mismatch/bounded" not in metrics


def test_a_sampler_that_computes_as_the_trainer_has_weights_of_1() -> None:
    advantages, metrics = Correction("mask", "sequence", 1.0).weigh(ADVANTAGES, OLD, OLD, MASK)
    assert torch.equal(advantages, ADVANTAGES)
    assert mismatch.derived({name: value(mean) for name, mean in metrics.items()}) == {"mismatch/ess": 1.0}
    assert mismatch.largest(OLD, OLD, MASK) == 0.0


def test_log_probs_that_the_sampler_did_not_keep_are_corrected_and_counted_nowhere() -> None:
    nothing = torch.full_like(SAMPLED, math.nan)
    advantages, metrics = Correction("truncate", "token", 2.0).weigh(ADVANTAGES, OLD, nothing, MASK)
    assert torch.equal(advantages, ADVANTAGES)
    assert all(mean.count == 0 for mean in metrics.values())
