"""Which way a loss pushes its completions: from the type of its examples, not from the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from halos.certify.case import WIDTH, Case, Subject, synthetic_case
from halos.certify.tabular import Shift
from halos.certify.verdict import Finding, judged, not_applicable
from halos.examples import Comparison, Demonstration, Judgement
from halos.types import PackRow, RolloutInput

NATS = 4.0  # by which a completion is made more or less likely than under the reference
LONG = 256  # times the tokens of other checks: completions of up to 1536


def wanted(case: Case) -> Iterator[tuple[PackRow, float]]:
    """Each sequence and 1 where the loss should make it more likely, -1 where less; nothing where its type does not say.

    Of rollouts only the advantages say it: they have no entry.
    """
    example = case.inputs.example
    for item in case.items:
        rows = case.inputs.rows([item])
        if issubclass(example, Comparison):
            yield from ((row, 1.0 if n == 0 else -1.0) for n, row in enumerate(rows[:2]))
        elif issubclass(example, Judgement):
            yield from ((row, 1.0 if item.labels["desirable"] > 0 else -1.0) for row in rows)
        elif issubclass(example, Demonstration):
            yield from ((row, 1.0) for row in rows)


def signs(subject: Subject) -> Finding:
    """Where policy and reference are equal, as at the start: what should become more likely has a slope of at most 0."""
    if issubclass(subject.inputs, RolloutInput):
        return _signs_of_advantages(subject)
    if subject.candidates:
        return not_applicable("it learns a teacher's distribution, and not to make completions more likely")
    case = synthetic_case(subject, at_reference=subject.refers)
    directions = list(wanted(case))
    if not directions:
        return _no_direction(subject)
    subject.step(case, case.whole)
    slopes = [direction * case.policy.gradient(row).sum().item() for row, direction in directions]
    largest = max(map(abs, slopes))
    wrong = [(n, slope) for n, slope in enumerate(slopes) if slope > 1e-6 * largest]
    if not all(map(math.isfinite, slopes)):
        problem = "a gradient is not finite"
    elif largest == 0:
        problem = "all gradients are 0: nothing is learned"
    elif wrong:
        names = _names(subject, directions)
        problem = f"{names[wrong[0][0]]} is pushed the wrong way ({len(wrong)} of {len(slopes)} completions)"
    else:
        problem = _still_side(subject, directions, slopes)
    still = sum(abs(slope) <= 1e-6 * largest for slope in slopes)
    rest = f"; {still} of {len(slopes)} completions are not pushed" if still else ""
    return judged(problem, f"{_meaning(subject)}{rest}")


def _still_side(subject: Subject, directions: list[tuple[PackRow, float]], slopes: list[float]) -> str | None:
    """What is wrong where one of two sides has no gradient in any row."""
    names = _names(subject, directions)
    pushed = {name for name, slope in zip(names, slopes, strict=True) if slope}
    still = [name for name in names if name not in pushed]
    return f"{still[0]} is never pushed: its gradients are all 0" if still else None


def long_completions(subject: Subject) -> Finding:
    """A token of a completion with a gradient has one, however late it comes: where policy and reference are equal, and nothing
    is clipped; a teacher's distribution is another."""
    if subject.inputs.head not in ("language", "value"):
        return not_applicable("it reads no log-probs of tokens")
    case = synthetic_case(subject, width=WIDTH * LONG, at_reference=not subject.candidates, first_pass=True)
    subject.step(case, case.whole)
    most = 0
    for n in range(len(case.items)):
        for row in case.rows(n):
            gradients = [leaf.grad.reshape(len(leaf), -1) for leaf in case.policy.entry(row).values() if leaf.grad is not None]
            reached = torch.cat(gradients, 1).any(1) if gradients else torch.zeros(0, dtype=torch.bool)
            if reached.any() and not reached.all():
                first, count = int((~reached).nonzero()[0]), int((~reached).sum())
                rest = f", and {count - 1} others" if count > 1 else ""
                return judged(f"token {first + 1} of the {len(reached)} of a completion has no gradient{rest}", "")
            most = max(most, len(reached))
    return judged(None, f"every token of completions of up to {most} tokens has a gradient")


def _names(subject: Subject, directions: list[tuple[PackRow, float]]) -> list[str]:
    up, down = _words(subject)
    return [up if direction > 0 else down for _, direction in directions]


def _words(subject: Subject) -> tuple[str, str]:
    example = subject.inputs.example
    if issubclass(example, Comparison):
        return "the chosen completion", "the rejected completion"
    return ("a desirable completion", "an undesirable one") if issubclass(example, Judgement) else ("a demonstration", "")


def _meaning(subject: Subject) -> str:
    up, down = _words(subject)
    return f"{up} up" + (f", {down} down" if down else "")


def _signs_of_advantages(subject: Subject) -> Finding:
    """On the first pass, where every ratio is 1, a token's log-prob is pushed as its advantage says: the slope and the advantage
    have opposite signs, and negated advantages negate the slope."""
    slopes = []
    for sign in (1.0, -1.0):
        case = synthetic_case(subject, at_reference=True, first_pass=True, sign=sign)
        subject.step(case, case.whole)
        slopes.append([case.policy.gradient(case.rows(n)[0]) for n in range(len(case.items))])
    ups = [n for n, each in enumerate(slopes[0]) if each.sum() < -1e-12]
    rewards = [next(iter(item.labels.values())) for item in case.items]
    best, worst = max(range(len(rewards)), key=rewards.__getitem__), min(range(len(rewards)), key=rewards.__getitem__)
    problem = None
    if not any(each.any() for each in slopes[0]):
        problem = "all gradients are 0: nothing is learned"
    elif best not in ups or worst in ups:
        problem = f"the completion with the {'highest reward is not' if best not in ups else 'lowest reward is'} made more likely"
    elif not all(torch.allclose(a, -b, rtol=1e-6, atol=1e-12) for a, b in zip(*slopes, strict=True)):
        problem = "negated advantages do not negate the gradient where every ratio is 1"
    return judged(problem, "as the advantages say; negated advantages negate the gradient where every ratio is 1")


def swap(subject: Subject) -> Finding:
    """A policy that prefers what it should, by 4 nats each way, has a smaller loss than one that prefers the opposite."""
    probe = synthetic_case(subject)
    directions = dict((row[1].ids.tobytes(), direction) for row, direction in wanted(probe))
    if not directions or not min(directions.values()) < 0:
        return not_applicable(_one_sided(subject))

    def moved(by: float) -> Shift:
        return lambda row: by * directions.get(row[1].ids.tobytes(), 0.0)

    steps = []
    for by in (NATS, -NATS):
        case = synthetic_case(subject, at_reference=True, shift=moved(by))
        steps.append(subject.step(case, case.whole))
    right, wrong = (_rows(step.values, step.total) for step in steps)
    bad = int((right >= wrong).sum())
    problem = f"the loss of {bad} of {len(right)} rows is no larger with the two sides exchanged" if bad else None
    gap = (wrong - right).mean().item()
    good = f"exchanging the sides raises the loss, by {gap:.3g} where each is {NATS:g} nats from the reference"
    return judged(problem, good)


def _rows(values: Tensor | None, total: float) -> Tensor:
    return torch.tensor([total]) if values is None or values.isnan().any() else values


def _one_sided(subject: Subject) -> str:
    if issubclass(subject.inputs, RolloutInput):
        return "advantages, no two sides"
    return "one kind of completion" if issubclass(subject.inputs.example, Demonstration) else _no_direction(subject).evidence


def _no_direction(subject: Subject) -> Finding:
    kind = subject.inputs.example.__name__
    return not_applicable(f"a {kind} does not say which completion should become more likely")
