"""Properties of every loss of config/loss, derived from its signature alone: a new loss and its YAML are picked up here."""

from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from halos.types import Range, TokenLogps

from .cases import (
    KNOWN,
    ROWS,
    WHOLE,
    WIDTH,
    Case,
    call,
    counts,
    inputs,
    keywords,
    leaves,
    mapped,
    mean,
    of_this_package,
    positional,
    rows,
    with_gradient,
)
from .samples import add_up

# a mixture, and losses of inputs that `cases.sample` cannot make, each with a test file of its own
ELSEWHERE = {"wpo", "mpo", "gkd"}
CASES = [case for case in of_this_package() if case.name not in ELSEWHERE]
every_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_loss
def test_inputs_of_its_kind_can_be_made_here(case: Case):
    assert next(iter(positional(case.function).values())) in KNOWN, "teach cases.sample to make them, or name it in ELSEWHERE"


@every_loss
def test_its_yaml_names_each_hyperparameter_and_nothing_else(case: Case):
    """The functions of its module that rewrite examples, compute advantages, adapt a coefficient or change the loss's state may
    have some too."""
    helpers = [vars(case.module).get(name) for name in ("examples", "advantages", "adapt", "adapt_entropy", "update")]
    legal = {name for part in (case.function, *helpers) if part for name in keywords(part)}
    assert case.settings.keys() - {"_target_"} == legal


@every_loss
def test_its_defaults_are_within_their_bounds(case: Case):
    hints = get_type_hints(case.function, include_extras=True)
    for name, value in case.hyperparameters.items():
        limits = [x for x in getattr(hints[name], "__metadata__", ()) if isinstance(x, Range)]
        assert value is None or [limit.violated_by(value) for limit in limits] == [None] * len(limits)
        assert not isinstance(value, str) or value in get_args(hints[name])
    check = vars(case.module).get("check")
    assert check is None or check(**{k: v for k, v in case.settings.items() if k in keywords(check)}) is None


@every_loss
def test_every_numeric_hyperparameter_is_bounded(case: Case):
    hints = get_type_hints(case.function, include_extras=True)
    for name in case.hyperparameters:
        numeric = float in (plain := get_type_hints(case.function)[name], *get_args(plain))
        assert not numeric or any(isinstance(x, Range) for x in getattr(hints[name], "__metadata__", ()))


@every_loss
def test_its_objective_is_a_metric_that_the_run_reports(case: Case):
    """The trainer adds the loss's own mean and, where chosen and rejected are means of different rows, their difference."""
    reported = {"loss", *call(case, inputs(case)).metrics}
    if {"rewards/chosen", "rewards/rejected"} <= reported:
        reported.add("rewards/margins")
    assert case.objective in reported


@every_loss
def test_values_are_unreduced_float32_and_finite(case: Case):
    for loss in call(case, inputs(case)).terms.values():
        assert loss.values.shape == ((ROWS, WIDTH) if loss.per.endswith("token") else (ROWS,))
        assert loss.values.dtype == torch.float32
        assert loss.values.isfinite().all()


@every_loss
def test_metrics_are_detached_float32_scalars(case: Case):
    given = inputs(case)
    first = next(iter(given))
    for metric in call(case, {**given, first: with_gradient(given[first])}).metrics.values():
        for part in (metric.total, metric.count):
            assert part.shape == ()
            assert part.dtype == torch.float32
            assert not part.requires_grad


@every_loss
def test_padding_changes_neither_values_nor_metrics_nor_gradients(case: Case):
    def widen(part: Tensor | TokenLogps) -> Tensor | TokenLogps:
        if isinstance(part, Tensor):
            return torch.nn.functional.pad(part, (0, 3)) if part.ndim == 2 else part
        more = torch.zeros(len(part.values), 3)
        return TokenLogps(torch.cat([part.values, more], 1), torch.cat([part.mask, more.bool()], 1))

    given = inputs(case)
    name = next(iter(given))
    results = []
    for padded in (False, True):
        batch = {k: mapped(v, widen) if padded and k not in WHOLE else v for k, v in given.items()}
        batch[name] = with_gradient(batch[name])
        loss = call(case, batch)
        total = mean(loss, counts(batch))
        results.append((total, add_up([loss]), torch.autograd.grad(total, leaves(batch[name]), allow_unused=True)))
    (value, metrics, gradient), (padded_value, padded_metrics, padded_gradient) = results
    torch.testing.assert_close(padded_value, value, rtol=1e-6, atol=1e-6)
    assert padded_metrics == {k: pytest.approx(v, abs=1e-5) for k, v in metrics.items()}
    for plain, wide in zip(gradient, padded_gradient, strict=True):
        if plain is not None and plain.ndim == 2:
            torch.testing.assert_close(wide[:, : plain.shape[1]], plain, rtol=5e-7, atol=1e-7)  # the last digit of float32
        else:
            torch.testing.assert_close(wide, plain)


@every_loss
@pytest.mark.parametrize("cuts", [[0, 1, 2, 3, 4, 5], [0, 2, 5], [0, 4, 5]], ids=["1+1+1+1+1", "2+3", "4+1"])
def test_micro_batches_add_up_to_the_whole(case: Case, cuts: list[int]):
    given = inputs(case)
    name = next(iter(given))
    given[name] = with_gradient(given[name])
    whole = call(case, given)
    pieces = [rows(given, slice(start, stop)) for start, stop in pairwise(cuts)]
    parts = [call(case, piece) for piece in pieces]
    denominators = counts(given)
    total, added = mean(whole, denominators), torch.stack([mean(part, denominators) for part in parts]).sum()
    torch.testing.assert_close(added, total, rtol=1e-6, atol=1e-6)
    assert add_up(parts) == {k: pytest.approx(v, rel=1e-5, abs=1e-5) for k, v in add_up([whole]).items()}
    of_whole, of_parts = (torch.autograd.grad(x, leaves(given[name]), allow_unused=True) for x in (total, added))
    torch.testing.assert_close(of_parts, of_whole, rtol=5e-6, atol=1e-8)


@every_loss
def test_every_micro_batch_reports_the_same_keys_and_no_nan(case: Case):
    given = inputs(case)
    keys = call(case, given).metrics.keys()
    for i in range(ROWS):
        metrics = call(case, rows(given, slice(i, i + 1))).metrics
        assert metrics.keys() == keys
        assert all(each.total.isfinite() and each.count.isfinite() for each in metrics.values())


@every_loss
def test_log_probs_of_any_size_leave_value_and_gradient_finite(case: Case):
    def enlarge(part: Tensor | TokenLogps) -> Tensor | TokenLogps:
        if isinstance(part, TokenLogps):
            return TokenLogps(part.values * 1e4, part.mask)
        return part * 1e4 if part.is_floating_point() else part

    given = {name: value if name == "state" else mapped(value, enlarge) for name, value in inputs(case).items()}
    name = next(iter(given))
    given[name] = with_gradient(given[name])
    loss = call(case, given)
    assert loss.values.isfinite().all()
    for gradient in torch.autograd.grad(loss.values.sum(), leaves(given[name]), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@every_loss
def test_log_probs_rounded_to_bfloat16_move_the_loss_as_little_as_its_slope_allows(case: Case):
    """First order: the sum over leaves of |gradient| times the rounding, 2^-9 of each value; twice that is the bound."""

    def rounded(part: Tensor | TokenLogps) -> Tensor | TokenLogps:
        if isinstance(part, TokenLogps):
            return TokenLogps(part.values.bfloat16().float(), part.mask)
        return part.bfloat16().float() if part.is_floating_point() else part

    given = inputs(case)
    name = next(iter(given))
    exact = {**given, name: with_gradient(given[name])}
    total = call(case, exact).values.sum()
    sources = leaves(exact[name])
    slopes = torch.autograd.grad(total, sources, allow_unused=True)
    first_order = sum((s * x).abs().sum().item() for s, x in zip(slopes, sources, strict=True) if s is not None) * 2**-9
    moved = call(case, {**given, name: mapped(given[name], rounded)}).values.sum()
    assert moved.dtype == torch.float32
    assert 0 < abs((moved - total).item()) < 2 * first_order
