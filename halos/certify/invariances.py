"""What must not change a loss: padding, the cut into micro-batches and ranks, the order of rows, the float type."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from halos.certify.case import ROWS, Case, Step, Subject, synthetic_case
from halos.certify.verdict import Finding, judged, not_applicable
from halos.examples import Judgement, Scored
from halos.trainers.humanline import CLAMPED

TOLERANCE = 1e-6  # relative, in float64: metrics are sums in float32
STRETCH = 1e-4
ROUNDING = 1e-5  # of float32, relative to the loss and to sum |gradient x log-prob|


def _cut(*sizes: int) -> list[np.ndarray]:
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]


ALONE = [_cut(*[1] * ROWS)]
UNEVEN = [_cut(1, 3, 2)]
RANKS = [[np.array([0, 3]), np.array([4])], [np.array([1, 5]), np.array([], np.int64)], [np.array([2]), np.array([], np.int64)]]


def padding(subject: Subject) -> Finding:
    return _same(subject, lambda case: subject.step(case, case.whole, 3), "3 masked positions more")


def microbatches(subject: Subject) -> Finding:
    return _same(subject, lambda case: subject.step(case, ALONE), "one row in each")


def accumulation(subject: Subject) -> Finding:
    return _same(subject, lambda case: subject.step(case, UNEVEN), "1 + 3 + 2 rows")


def ranks(subject: Subject) -> Finding:
    good = "three ranks with 3, 2 and 1 rows, of which two wait in a micro-batch that counts nothing"
    return _same(subject, lambda case: subject.step(case, RANKS), good)


def order(subject: Subject) -> Finding:
    def backwards(case: Case) -> Step:
        turned = case.reordered(np.arange(len(case.items))[::-1].copy())
        return subject.step(turned, turned.whole)

    return _same(subject, backwards, "reversed")


def _same(subject: Subject, other: Callable[[Case], Step], good: str) -> Finding:
    """Compare a step over the whole batch at once with another one of the same rows, by the same tables."""
    case, first = whole_batch(subject)
    return judged(difference(first, other(case)), good)


@lru_cache(maxsize=1)
def whole_batch(subject: Subject) -> tuple[Case, Step]:
    """A global batch and its step in one micro-batch, which several checks compare with."""
    case = synthetic_case(subject)
    step = subject.step(case, case.whole)
    kept = {name: each.clone() for name, each in step.gradients.items()}
    return case, Step(step.total, kept, step.metrics, step.names, step.values)


def difference(whole: Step, other: Step) -> str | None:
    """The first thing in which two steps differ beyond rounding, in words; None where they agree."""
    if not math.isclose(whole.total, other.total, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        return f"the loss is {other.total:.7g}, not {whole.total:.7g}"
    largest = max((each.abs().max().item() for each in whole.gradients.values() if each.numel()), default=0.0)
    for name, each in whole.gradients.items():
        if not torch.allclose(each, other.gradients[name], rtol=TOLERANCE, atol=TOLERANCE * max(largest, 1e-12)):
            gap = (each - other.gradients[name]).abs().max().item()
            return f"the loss is the same, a gradient differs by {gap:.3g} of {largest:.3g}"
    keys = set(whole.names) | set(other.names)
    if len(keys) > 1:
        differing = frozenset.union(*keys) - frozenset.intersection(*keys)
        return f"micro-batches do not report the same metrics: {', '.join(sorted(differing))} in some alone"
    for name, (total, count) in whole.metrics.items():
        mean, theirs = (t / max(c, 1e-30) for t, c in ((total, count), other.metrics[name]))
        if count and not math.isclose(mean, theirs, rel_tol=1e-4, abs_tol=1e-5):
            return f"the metric {name} is {theirs:.6g}, not {mean:.6g}"
    return None


def float_types(subject: Subject) -> Finding:
    """float32 against float64 on the same numbers, each of which both types have; and in float64 a small change shows, which it
    would not if the loss were computed in half precision somewhere."""
    steps, slopes = [], 0.0
    for dtype in (torch.float32, torch.float64):
        case = synthetic_case(subject, dtype=dtype)
        steps.append(subject.step(case, case.whole))
        flat = case.policy.entries.values()
        slopes = sum(
            (leaf.grad * leaf.detach()).abs().sum().item() for entry in flat for leaf in entry.values() if leaf.grad is not None
        )
    single, double = steps
    allowed = ROUNDING * (abs(double.total) + slopes)
    off = abs(single.total - double.total)
    problem = f"float32 differs from float64 by {off:.3g}, beyond rounding ({allowed:.1g})" if not off <= allowed else None
    if problem is None:
        problem = _far_gradient(single, double) or _coarse(subject, slopes)
    return judged(problem, f"differs from float64 by {off:.1g} of {double.total:.4g}")


def _far_gradient(single: Step, double: Step) -> str | None:
    largest = max((each.abs().max().item() for each in double.gradients.values() if each.numel()), default=0.0)
    gaps = [
        (single.gradients[name].double() - each).abs().max().item() for name, each in double.gradients.items() if each.numel()
    ]
    gap = max(gaps, default=0.0)
    return f"a gradient in float32 differs from float64 by {gap:.3g} of {largest:.3g}" if gap > 1e-4 * largest else None


def _coarse(subject: Subject, slopes: float) -> str | None:
    """Stretch the policy's numbers twice by the same small amount: a smooth loss moves by nearly the same, a coarse one jumps."""
    totals = []
    for stretch in (1.0, 1 + STRETCH, 1 + 2 * STRETCH):
        case = synthetic_case(subject, stretch=stretch)
        totals.append(subject.step(case, case.whole).total)
    first, second = totals[1] - totals[0], totals[2] - totals[1]
    is_flat = first == second == 0 and slopes > 0
    if is_flat or abs(second - first) > 0.3 * max(abs(first), abs(second)) + 1e-9 * slopes:
        return f"log-probs that change by {STRETCH:g} of themselves move it by {first:.2g}, and then by {second:.2g}: it rounds"
    return None


def large_numbers(subject: Subject) -> Finding:
    """Log-probs of -30,000: loss and gradients stay finite, in float32."""
    case = synthetic_case(subject, scale=1e4, dtype=torch.float32)
    step = subject.step(case, case.whole)
    bad = [each for each in step.gradients.values() if not each.isfinite().all()]
    problem = f"the loss is {step.total}" if not math.isfinite(step.total) else "a gradient is not finite" if bad else None
    return judged(problem, f"log-probs down to -30,000 give {step.total:.4g}, gradients are finite")


def few_rows(subject: Subject) -> Finding:
    case, names = synthetic_case(subject, count=1), whole_batch(subject)[1].names[0]
    return judged(_unfit(subject.step(case, case.whole), names), "finite, and all metrics are there")


def absent_class(subject: Subject) -> Finding:
    """Only rows of one kind: labels of one class, or rewards that are all equal."""
    problems = []
    if not issubclass(subject.inputs.example, Judgement | Scored):
        return not_applicable("its rows are of one class")
    names = whole_batch(subject)[1].names[0]
    for label in (1.0, 0.0):
        case = synthetic_case(subject, label=lambda _, label=label: label)
        problem = _unfit(subject.step(case, case.whole), names)
        if problem is not None:
            problems.append(f"where every label is {label:g}, {problem}")
    return judged(problems[0] if problems else None, "rows that all have one label give finite numbers and the same metrics")


def _unfit(step: Step, names: frozenset[str]) -> str | None:
    if not math.isfinite(step.total):
        return f"the loss is {step.total}"
    if not all(each.isfinite().all() for each in step.gradients.values()):
        return "a gradient is not finite"
    if wrong := [name for name, mean in step.metrics.items() if not all(map(math.isfinite, mean))]:
        return f"the metric {wrong[0]} is {step.metrics[wrong[0]][0]}"
    if missing := names ^ step.names[0]:
        return f"other metrics are reported: {', '.join(sorted(missing))}"
    return None


def bad_numbers(subject: Subject) -> Finding:
    """NaN in the log-probs makes the loss NaN, so that the step is skipped; an infinite one makes the loss or a metric so."""
    seen, problem = [], None
    for value in (math.nan, -math.inf):
        case = synthetic_case(subject)
        for row in case.rows(1):
            _spoil(case.policy.entry(row), value)
        step = subject.step(case, case.whole)
        loss_shows, metric_shows = not math.isfinite(step.total), not _all_finite(step)
        if math.isnan(value) and not loss_shows:
            problem = f"NaN in the log-probs of a row gives a loss of {step.total:.4g}: the step would not be skipped"
        elif CLAMPED in step.metrics and not (loss_shows or metric_shows):
            slopes = [case.policy.gradient(row)[0].item() for row in case.rows(1)]
            problem = "a clamped infinite log-prob has a gradient" if any(slopes) else problem
            seen.append(f"{value:g} is clamped and has no gradient")
            continue
        elif not (loss_shows or metric_shows):
            problem = "an infinite log-prob shows neither in the loss nor in a metric"
        seen.append(f"{value:g} shows in {'the loss' if loss_shows else 'metrics'}{_which(step.values)}")
    return judged(problem, "; ".join(seen))


def _spoil(entry: dict[str, Tensor], value: float) -> None:
    with torch.no_grad():
        for leaf in entry.values():
            leaf[...] = torch.where(torch.arange(leaf.numel()).reshape(leaf.shape) == 0, value, leaf)


def _all_finite(step: Step) -> bool:
    return all(math.isfinite(total) for total, _ in step.metrics.values())


def _which(values: Tensor | None) -> str:
    """Whether the rows behind a bad step can be named."""
    if values is None:
        return ""
    bad = int((~values.isfinite()).sum())
    return f" ({'of its own row' if bad == 1 else f'of {bad} rows'})" if bad else ""


def value_at_reference(subject: Subject) -> Finding:
    """The loss of a policy that equals its reference, as at the start of a run, is finite with a finite gradient."""
    if not subject.refers:
        return not_applicable("reference-free")
    case = synthetic_case(subject, at_reference=True, first_pass=True)
    step = subject.step(case, case.whole)
    problem = _unfit(step, step.names[0])
    spread = "" if step.values is None or step.values.numel() == 0 else _spread(step.values)
    return judged(problem, f"the loss is {step.total:.6f}{spread}")


def _spread(values: Tensor) -> str:
    least, most = values.min().item(), values.max().item()
    return ", of every row" if math.isclose(least, most, rel_tol=1e-6, abs_tol=1e-6) else f", of rows {least:.4g} to {most:.4g}"
