"""Importance weights for what the sampler computes otherwise, against numbers worked by hand."""

import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from halos.config.bind import LossSpec
from halos.config.schema import Train
from halos.metrics import Window
from halos.trainers import mismatch
from halos.trainers.mismatch import Correction
from halos.types import Mean

MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
RATIOS = torch.tensor([[2.0, 0.5, 3.0], [0.25, 1.0, 9.0], [1.0, 9.0, 9.0]])  # pi_trainer / pi_sampler; the last row's is unknown
SAMPLED = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.0, 0.0], [math.nan, 0.0, 0.0]])
OLD = torch.where(SAMPLED.isnan(), -1.0, SAMPLED + RATIOS.log())
ADVANTAGES = torch.tensor([[1.0], [-2.0], [4.0]]) * MASK


def weighed(kind: str, level: str, cap: float = 2.0, floor: float | None = None) -> tuple[Tensor, dict[str, float]]:
    advantages, metrics = Correction(kind, level, cap, floor).weigh(ADVANTAGES, OLD, SAMPLED, MASK)
    return advantages, {name: value(mean) for name, mean in metrics.items()}


def value(mean: Mean) -> float:
    return (mean.total / mean.count).item()


@pytest.mark.parametrize(
    ("kind", "level", "floor", "weights", "bounded"),
    [
        ("truncate", "token", None, [[2.0, 0.5, 2.0], [0.25, 1.0, 0.0], [1.0, 0.0, 0.0]], 1 / 5),
        ("mask", "token", None, [[2.0, 0.5, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], 2 / 5),
        ("reject", "token", None, [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], 2 / 5),
        ("truncate", "sequence", None, [[2.0, 2.0, 2.0], [0.25, 0.25, 0.0], [1.0, 0.0, 0.0]], 1 / 2),
        ("mask", "sequence", None, [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 1.0),
        # the products are 3 and 0.25, of 3 tokens and of 2
        ("truncate", "geometric", None, [[3 ** (1 / 3)] * 3, [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], 0.0),
        ("truncate", "token", 0.75, [[2.0, 0.75, 2.0], [0.75, 1.0, 0.0], [1.0, 0.0, 0.0]], 3 / 5),
        ("mask", "token", 0.0, [[2.0, 0.5, 0.0], [0.25, 1.0, 0.0], [1.0, 0.0, 0.0]], 1 / 5),
        ("mask", "sequence", 0.2, [[0.0, 0.0, 0.0], [0.25, 0.25, 0.0], [1.0, 0.0, 0.0]], 1 / 2),
        ("mask", "geometric", 0.75, [[3 ** (1 / 3)] * 3, [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 1 / 2),
        ("reject", "geometric", 0.75, [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 1 / 2),
    ],
)
def test_advantages_are_weighed_by_a_bounded_ratio(
    kind: str, level: str, floor: float | None, weights: list[list[float]], bounded: float
) -> None:
    # an epsilon above the cap of 2, which rounding may pass
    advantages, metrics = weighed(kind, level, 2.0 + 1e-6, floor)
    torch.testing.assert_close(advantages, ADVANTAGES * torch.tensor(weights), rtol=1e-5, atol=1e-6)
    assert metrics["mismatch/bounded"] == pytest.approx(bounded)


def test_the_keys_of_a_run_choose_the_correction() -> None:
    keys = {"correction": "mask", "correction_level": "geometric", "correction_cap": 3.0, "correction_floor": 0.5}
    train, loss = cast("Train", SimpleNamespace(**keys)), cast("LossSpec", SimpleNamespace(ratio_level="sequence"))
    assert Correction.of(train, loss, same_arithmetic=True) == Correction("mask", "geometric", 3.0, 0.5)
    train = cast("Train", SimpleNamespace(**{**keys, "correction": "auto", "correction_level": None}))
    kinds = [Correction.of(train, loss, same_arithmetic=same) for same in (True, False)]
    assert kinds == [Correction("none", "sequence", 3.0, 0.5), Correction("truncate", "sequence", 3.0, 0.5)]


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


def test_over_steps_the_largest_difference_is_the_largest_and_the_others_are_means() -> None:
    window = Window()
    for value in (0.25, 1.0, 0.5):
        window.add({"mismatch/max": (value, 1.0), "mismatch/mean": (value, 1.0)})
    assert window.means() == {"mismatch/max": 1.0, "mismatch/mean": pytest.approx(1.75 / 3)}
    window.add({"mismatch/max": (math.nan, 1.0)})
    window.add({"mismatch/max": (2.0, 1.0)})
    assert math.isnan(window.means()["mismatch/max"])
