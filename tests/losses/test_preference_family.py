"""Losses on pairs that differ by one formula: numbers worked by hand in float64, from D_w, D_l and lengths (samples.py)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from halos.losses.aot import aot
from halos.losses.aot import statistics as preferences
from halos.losses.aot_unpaired import aot_unpaired
from halos.losses.aot_unpaired import statistics as ratios
from halos.losses.apo_down import apo_down
from halos.losses.apo_zero import apo_zero
from halos.losses.cpo import cpo
from halos.losses.discopop import discopop
from halos.losses.dpo import dpo
from halos.losses.dpo_norm import dpo_norm
from halos.losses.dpop import dpop
from halos.losses.exo import exo
from halos.losses.f_dpo import check as check_f_dpo
from halos.losses.f_dpo import f_dpo
from halos.losses.hinge import hinge
from halos.losses.ld_dpo import ld_dpo
from halos.losses.nca import nca
from halos.losses.robust import robust
from halos.losses.rpo import rpo
from halos.losses.sppo import sppo
from halos.types import Loss, Pair

from .samples import POLICY, REFERENCE, H, gradients, logps, margins, number, numbers, pair, softplus, whole

Function = Callable[..., Loss]
D_W, D_L = np.array([0.75, -0.75]), np.array([-0.75, 0.25])
LENGTHS_W, LENGTHS_L = np.array([3, 2]), np.array([2, 4])
LP_W = np.array([-1.75, -2.5])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def logsigmoid(x: np.ndarray) -> np.ndarray:
    return -softplus(-np.asarray(x, np.float64))


def kl(p: np.ndarray, q: float) -> np.ndarray:
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


# a loss, its hyperparameters, its values, their digits, the value where policy == reference, signs of d/d lp_w, d/d lp_l there
FAMILY: list[tuple[Function, dict[str, Any], np.ndarray, list[float], float, tuple[int, int]]] = [
    (hinge, {"beta": 0.1}, 1 - 0.1 * H, [0.85, 1.1], 1.0, (-1, 1)),
    (robust, {"beta": 0.1, "label_smoothing": 0.1}, (0.9 * softplus(-0.1 * H) - 0.1 * softplus(0.1 * H)) / 0.8,
     [0.602207, 0.756897], np.log(2), (-1, 1)),
    (exo, {"beta": 0.1, "label_smoothing": 0.001}, kl(sigmoid(0.1 * H), 0.999), [2.505517, 2.935004],
     -np.log(2) - 0.5 * np.log(0.999 * 0.001), (-1, 1)),
    (nca, {"beta": 0.1}, -logsigmoid(0.1 * D_W) - 0.5 * logsigmoid(-0.1 * D_W) - 0.5 * logsigmoid(-0.1 * D_L),
     [1.350200, 1.412388], 2 * np.log(2), (-1, 1)),
    (apo_zero, {"beta": 0.1}, 1 - sigmoid(0.1 * D_W) + sigmoid(0.1 * D_L), [0.962518, 1.024991], 1.0, (-1, 1)),
    (apo_down, {"beta": 0.1}, sigmoid(0.1 * D_W) + 1 - sigmoid(0.1 * H), [0.981311, 1.006238], 1.0, (0, 1)),
    (sppo, {"beta": 0.1}, (D_W - 5) ** 2 + (D_L + 5) ** 2, [36.125, 60.625], 50.0, (-1, 1)),
    (discopop, {"beta": 0.1, "tau": 0.05},
     (1 - sigmoid(2 * H)) * softplus(-0.1 * H) + sigmoid(2 * H) * np.exp(-0.1 * H), [0.849338, 0.787402],
     0.5 * np.log(2) + 0.5, (1, -1)),  # it is not convex, and falls towards both sides of a maximum
    (dpop, {"beta": 0.3, "penalty": 50.0}, softplus(-0.3 * (H - 50 * np.array([0, 0.75]))),
     [0.493249, 11.550010], np.log(2), (-1, 1)),
    (dpo_norm, {"beta": 5.0}, softplus(-5 * (D_W / LENGTHS_W - D_L / LENGTHS_L)), [0.042999, 2.293837], np.log(2), (-1, 1)),
    (f_dpo, {"beta": 0.1, "divergence": "js", "alpha": None},
     softplus(-0.1 * (logsigmoid(D_W) - logsigmoid(D_L))), [0.656350, 0.721587], np.log(2), (-1, 1)),
    (f_dpo, {"beta": 0.1, "divergence": "forward_kl", "alpha": None}, softplus(-0.1 * (np.exp(-D_L) - np.exp(-D_W))),
     [0.614293, 0.762294], np.log(2), (-1, 1)),
    (f_dpo, {"beta": 0.1, "divergence": "alpha", "alpha": 0.5},
     softplus(-0.2 * (np.exp(-0.5 * D_L) - np.exp(-0.5 * D_W))), [0.619321, 0.752034], np.log(2), (-1, 1)),
]  # fmt: skip
family = pytest.mark.parametrize(
    ("loss", "settings", "by_hand", "digits", "start", "signs"), FAMILY,
    ids=[f"{loss.__name__}-{settings.get('divergence', '')}".strip("-") for loss, settings, *_ in FAMILY],
)  # fmt: skip


@family
def test_values_by_hand_at_the_reference_and_their_slopes(
    loss: Function, settings: dict[str, Any], by_hand: np.ndarray, digits: list[float], start: float, signs: tuple[int, int]
) -> None:
    assert numbers(loss(pair(*POLICY), pair(*REFERENCE), **settings)) == pytest.approx(by_hand, abs=2e-6)
    assert by_hand == pytest.approx(digits, abs=1e-6)
    policy = pair(*POLICY)
    same = loss(policy, pair(*POLICY), **settings)
    assert numbers(same) == pytest.approx([start, start], abs=2e-6)
    slopes = [gradient[:, 0] for gradient in gradients(same, policy.chosen.values, policy.rejected.values)]
    assert [np.sign(np.round(slope, 7)).tolist() for slope in slopes] == [[sign] * 2 for sign in signs]


def test_robust_without_smoothing_is_dpo_and_with_it_its_mean_over_flips_is_dpo() -> None:
    """E over labels that are flipped with probability e of robust's loss is DPO's of the true labels: it is unbiased."""
    policy, reference, e = pair(*POLICY), pair(*REFERENCE), 0.2
    true = numbers(dpo(policy, reference, beta=0.1))
    assert numbers(robust(policy, reference, beta=0.1, label_smoothing=0.0)) == pytest.approx(true, abs=1e-6)
    kept = numbers(robust(policy, reference, beta=0.1, label_smoothing=e))
    flipped = numbers(robust(pair(*POLICY[::-1]), pair(*REFERENCE[::-1]), beta=0.1, label_smoothing=e))
    assert (1 - e) * kept + e * flipped == pytest.approx(true, abs=1e-6)


def test_exo_is_0_where_the_policy_prefers_as_the_smoothed_labels_do() -> None:
    policy, reference = margins(np.log(9) / 0.1)
    assert numbers(exo(policy, reference, beta=0.1, label_smoothing=0.1)) == pytest.approx([0.0], abs=1e-6)


def test_the_alpha_divergence_lies_between_dpo_and_the_forward_kl() -> None:
    def at(divergence: str, alpha: float | None) -> np.ndarray:
        return numbers(f_dpo(pair(*POLICY), pair(*REFERENCE), beta=0.1, divergence=divergence, alpha=alpha))  # type: ignore[arg-type]

    assert at("alpha", 1e-4) == pytest.approx(numbers(dpo(pair(*POLICY), pair(*REFERENCE), beta=0.1)), abs=1e-4)
    assert at("alpha", 1 - 1e-7) == pytest.approx(at("forward_kl", None), abs=1e-5)
    assert check_f_dpo(divergence="js", alpha=0.5) is not None
    assert check_f_dpo(divergence="alpha", alpha=None) is not None
    assert check_f_dpo(divergence="alpha", alpha=0.5) is check_f_dpo(divergence="js", alpha=None) is None


def test_rpo_and_cpo_anchor_the_chosen_completion_each_by_its_own_mean() -> None:
    """RPO: log pi per token of each pair, then over pairs. CPO: over all 5 tokens of the chosen completions."""
    loss = rpo(pair(*POLICY), pair(*REFERENCE), beta=0.1, alpha=0.5)
    assert numbers(loss) == pytest.approx(softplus(-0.1 * H) - 0.5 * LP_W / LENGTHS_W, abs=1e-6)
    assert numbers(loss) == pytest.approx([0.912624, 1.369397], abs=1e-6)
    terms = cpo(pair(*POLICY), beta=0.1, alpha=0.5).terms
    assert numbers(terms["loss/preference"]) == pytest.approx(softplus([0.0, -0.05]), abs=1e-6)
    assert terms["loss/preference"].per == "item"
    assert terms["loss/nll"].per == "chosen_token"
    assert numbers(terms["loss/nll"]).sum() == pytest.approx(0.5 * 4.25, abs=1e-6)


def test_ld_dpo_weighs_what_is_longer() -> None:
    """The first chosen completion is longer by its third token, the second rejected one by its last two."""
    policy, reference = pair(*POLICY), pair(*REFERENCE)
    d_w, d_l = np.array([0.5 + 0.5 * 0.25, -0.75]), np.array([-0.75, 0.75 - 0.5 * 0.5])
    loss = ld_dpo(policy, reference, beta=0.1, alpha=0.5)
    assert numbers(loss) == pytest.approx(softplus(-0.1 * (d_w - d_l)), abs=1e-6)
    assert numbers(loss) == pytest.approx([0.626759, 0.757599], abs=1e-6)
    chosen, rejected = gradients(loss, policy.chosen.values, policy.rejected.values)
    assert chosen[0, 2] == pytest.approx(0.5 * chosen[0, 0])
    assert rejected[1] == pytest.approx(rejected[1, 0] * np.array([1, 1, 0.5, 0.5]))
    assert numbers(ld_dpo(policy, reference, beta=0.1, alpha=1.0)) == pytest.approx(numbers(dpo(policy, reference, beta=0.1)))


# --- AOT ---------------------------------------------------------------------------------------------------------------


def batch(*pairs: tuple[float, float, float, float]) -> tuple[Pair, Pair]:
    """Pairs of (lp_w, lp_l, ref_w, ref_l), of one token each."""
    chosen, rejected, of_chosen, of_rejected = zip(*pairs, strict=True)
    return Pair(whole(*chosen), whole(*rejected)), Pair(whole(*of_chosen), whole(*of_rejected))


# policy's preferences 2, -1, 4; the reference's 1, 3, 0: sorted -1, 2, 4 and 0, 1, 3. D_w -1, 0, 2; D_l -2, 4, -2
THREE = ((-2.0, -4.0, -1.0, -2.0), (-3.0, -2.0, -3.0, -6.0), (-1.0, -5.0, -3.0, -3.0))


def test_aot_compares_the_quantiles_of_two_distributions() -> None:
    policy, reference = batch(*THREE)
    paired = aot(policy, reference, preferences(policy, reference), beta=0.5, label_smoothing=0.0)
    assert numbers(paired) == pytest.approx(softplus(-0.5 * np.array([2.0 - 1, -1 - 0, 4 - 3])), abs=1e-6)
    # chosen sorted -1, 0, 2 at the pairs 0, 1, 2; rejected sorted -2, -2, 4
    unpaired = aot_unpaired(policy, reference, ratios(policy, reference), beta=0.5, label_smoothing=0.1)
    h = 0.5 * np.array([-1 + 2, 0 + 2, 2 - 4])
    assert numbers(unpaired) == pytest.approx(0.9 * softplus(-h) + 0.1 * softplus(h), abs=1e-6)


@pytest.mark.parametrize(("loss", "statistics"), [(aot, preferences), (aot_unpaired, ratios)])
def test_the_gradient_of_aot_is_that_of_sorting_the_whole_batch_ties_and_micro_batches_included(
    loss: Function, statistics: Callable[..., torch.Tensor]
) -> None:
    pairs = (*THREE, THREE[0], (-0.5, -1.5, -2.0, -1.0))  # the first one twice, so that ranks are shared

    def slopes(total: torch.Tensor, policy: Pair) -> np.ndarray:
        found = torch.autograd.grad(total, [policy.chosen.values, policy.rejected.values])
        return np.stack([gradient.numpy()[:, 0] for gradient in found])

    def rows(side: Pair, cut: slice) -> Pair:
        return Pair(logps(side.chosen.values[cut].tolist()), logps(side.rejected.values[cut].tolist()))

    policy, reference = batch(*pairs)
    known = statistics(policy, reference).detach()
    parts = [loss(rows(policy, cut), rows(reference, cut), known, beta=0.5, label_smoothing=0.1)
             for cut in (slice(0, 2), slice(2, 5))]  # fmt: skip
    whole_batch = loss(policy, reference, known, beta=0.5, label_smoothing=0.1)
    assert sum(numbers(part).sum() for part in parts) == pytest.approx(numbers(whole_batch).sum(), abs=1e-6)

    other, _ = batch(*pairs)
    d = [(mine.sum - theirs.sum) for mine, theirs in ((other.chosen, reference.chosen), (other.rejected, reference.rejected))]
    upper, lower = (d[0], d[1]) if loss is aot_unpaired else (other.chosen.sum - other.rejected.sum,
                                                              reference.chosen.sum - reference.rejected.sum)  # fmt: skip
    h = 0.5 * (upper.sort().values - lower.sort().values)
    by_sorting = (0.9 * torch.nn.functional.softplus(-h) + 0.1 * torch.nn.functional.softplus(h)).sum()
    assert numbers(whole_batch).sum() == pytest.approx(by_sorting.item(), abs=1e-6)
    expected, got = slopes(by_sorting, other), slopes(whole_batch.values.sum(), policy)
    for number_of, side in enumerate(expected):  # sorting gives equal values an order: their slopes are shared
        ranked = (d[number_of] if loss is aot_unpaired else upper).detach()
        side[:] = [side[(ranked == each).numpy()].mean() for each in ranked]
    assert got == pytest.approx(expected, abs=1e-6)


def test_metrics_are_those_of_dpo() -> None:
    metrics = hinge(pair(*POLICY), pair(*REFERENCE), beta=0.1).metrics
    assert number(metrics["rewards/margins"]) == pytest.approx(0.1 * H.mean(), abs=1e-7)
