"""A made-up global batch: items of any input type, with the tables that stand in for policy, reference and sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from halos.certify.tabular import Shift, Table, nothing
from halos.examples import Completion, Item, Stepwise
from halos.types import LossInput, PackRow, RolloutInput

ROWS, WIDTH = 6, 6  # items of a global batch, and most scored tokens of a completion
LABELS = (1.0, 0.0, 0.5, 0.0, 1.0, 0.0)  # of the items, whatever their labels mean: above 0 is desirable
Part = np.ndarray  # positions of a micro-batch in the global batch; empty: padding of a rank that has no more rows
Plan = Sequence[Sequence[Part]]  # of each rank its micro-batches


@dataclass(frozen=True, slots=True)
class Step:
    """A global batch's loss, as the trainer would have it after the all-reduce of gradients and metrics."""

    total: float
    gradients: Mapping[str, Tensor]  # of each sequence's log-probs, values or score
    metrics: Mapping[str, tuple[float, float]]  # total and count
    names: Sequence[frozenset[str]]  # of the metrics of each micro-batch
    values: Tensor | None = None  # (items,) where each has a loss of its own


class Subject(Protocol):
    """A loss that is to be proved."""

    @property
    def inputs(self) -> type[LossInput]: ...

    @property
    def refers(self) -> bool:
        """Whether it compares with a reference."""
        ...

    @property
    def token_statistics(self) -> tuple[str, ...]:
        """Of halos.types.TOKEN_STATISTICS those that it reads."""
        ...

    @property
    def candidates(self) -> int:
        """The ids of each token, besides its own, whose log-probs it reads."""
        ...

    def step(self, case: Case, plan: Plan, padding: int = 0) -> Step: ...


@dataclass
class Case:
    """Items and tables. `sampler` gives the old log-probs of rollouts; on the first pass they are the policy's own."""

    inputs: type[LossInput]
    items: Sequence[Item]
    partners: Sequence[Item]  # of each item one whose completion is put under its prompt
    policy: Table
    reference: Table
    sampler: Table
    first_pass: bool = False
    sign: float = 1.0  # of the advantages
    groups: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def whole(self) -> Plan:
        return [[np.arange(len(self.items))]]

    def rows(self, item: int) -> list[PackRow]:
        return self.inputs.rows([self.items[item]])

    def reordered(self, order: np.ndarray) -> Case:
        """The same global batch in another order."""
        items, partners = ([each[i] for i in order] for each in (self.items, self.partners))
        tables = (self.policy, self.reference, self.sampler)
        return Case(self.inputs, items, partners, *tables, self.first_pass, self.sign, self.groups[order])


def synthetic_case(
    subject: Subject, *, count: int = ROWS, label: Callable[[int], float] = lambda n: LABELS[n % len(LABELS)], seed: int = 0,
    width: int = WIDTH, at_reference: bool = False, shift: Shift = nothing, dtype: torch.dtype = torch.float64,
    scale: float = 1.0, stretch: float = 1.0, first_pass: bool = False, sign: float = 1.0,
) -> Case:  # fmt: skip
    """`at_reference`: policy, reference and sampler have the same log-probs, and values are 0. `shift` moves the policy against
    its reference: it moves the reference the other way, so that the policy's own log-probs stay; without one it moves the policy.
    `stretch` multiplies what the policy alone has, `scale` everything.
    """
    kind = subject.inputs
    items = [_item(kind, n, label(n), width) for n in range(count + 1)]
    partners = [*items[1:count], items[count] if count == 1 else items[0]]
    seeds = (seed, seed, seed) if at_reference else (seed, seed + 1, seed + 2)
    ours, theirs = (nothing, lambda row: -shift(row)) if subject.refers else (shift, nothing)
    policy = Table(seeds[0], dtype, kind.head, subject.token_statistics, ours, scale * stretch, 1.0, subject.candidates)
    head = "value" if kind.head == "value" else "language"
    reference = Table(seeds[1], dtype, head, (), theirs, scale, 1.0, subject.candidates)
    sampler = Table(seeds[2], dtype, head, (), nothing, scale, 0.0 if at_reference else 1.0)
    return Case(kind, items[:count], partners, policy, reference, sampler, first_pass, sign, np.arange(count) // 2)


def _item(kind: type[LossInput], number: int, label: float, width: int) -> Item:
    """Lengths up to `width`, a multiple of WIDTH, that differ between completions; one completion has a token that is not scored.
    Two items of rollouts share a prompt."""
    prompt = np.array([number // 2 if issubclass(kind, RolloutInput) else number, 7], np.int32)
    completions = []
    for which in range(len(kind.example.completed)):
        length = (1 + (5 * number + 3 * which + 2) % WIDTH) * (width // WIDTH)
        scored = np.ones(length, bool)
        if number == 2 and length > 2:
            scored[1] = False
        completions.append(
            Completion(np.arange(length, dtype=np.int32) + (100 * number + 50 * which) * (width // WIDTH) + 10, scored)
        )
    return Item(prompt, tuple(completions), f"row {number}", dict.fromkeys(kind.example.labels, label),
                step_labels=_step_labels(completions[0], label) if issubclass(kind.example, Stepwise) else None)  # fmt: skip


def _step_labels(completion: Completion, label: float) -> np.ndarray:
    """Of the steps of an item, which are not all equal."""
    return np.resize(np.array([label, 1 - label, 0.75], np.float32), int(completion.scored.sum()))
