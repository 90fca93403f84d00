"""Splits a global batch over ranks and then into micro-batches, and gathers results in the batch's order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from halos.examples import Item


class Rows(Protocol):
    """The rows that batches are taken from: a whole Dataset, or in a live loop what the current step has sampled."""

    groups: np.ndarray  # (rows,)
    scored: np.ndarray  # (rows, completions) numbers of scored tokens
    lengths: np.ndarray  # (rows, completions) tokens, the prompt's included
    labels: dict[str, np.ndarray]  # (rows,) each
    sampled_here: bool  # by the model in training, in this process

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Item: ...

    def lines(self) -> list[str]: ...


class Partners(Protocol):
    """For each row another, of another prompt: an array (rows,), or in a live loop that of the current batch."""

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Split:
    """Tokenised rows, and for a loss on mismatched completions the row that each takes its completion from."""

    rows: Rows
    mismatched_partners: Partners | None


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch of one rank. `weight` is 0 for padding, which only keeps the rank's collectives in step with the others."""

    items: Sequence[Item]
    mismatched_partners: Sequence[Item]
    positions: np.ndarray  # (items,) indices into the global batch
    num_scored: int  # number of scored tokens
    weight: float
    seed: int
    rollouts: Any = None  # the items' RolloutBatch, set by a policy gradient trainer


def split_into_microbatches(
    split: Split, indices: np.ndarray, accelerator: Accelerator, *, size: int, seeds: tuple[int, int]
) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch: items rank::world, at most `size` in each.

    Every rank gets the same number, so that all call the same collectives; a rank without items left gets the batch's first item
    with weight 0. `seeds` (the run's, the step) make a micro-batch's dropout a function of step, rank and number.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    own, most = np.arange(len(indices))[rank::world], -(-len(indices) // world)
    microbatches = []
    for number, start in enumerate(range(0, most, size)):
        positions = own[start : start + size]
        weight = 1.0 if len(positions) else 0.0
        positions = positions if len(positions) else np.zeros(1, np.int64)
        rows, partners = indices[positions], split.mismatched_partners
        partner_items = [split.rows[int(i)] for i in partners[rows]] if partners is not None else []
        seed = int(np.random.SeedSequence([*seeds, rank, number]).generate_state(1, np.uint64)[0] >> 1)
        items, num_scored = [split.rows[int(i)] for i in rows], int(split.rows.scored[rows].sum())
        microbatches.append(MicroBatch(items, partner_items, positions, num_scored, weight, seed))
    return microbatches


def gather_in_order(values: Tensor, total: int, accelerator: Accelerator) -> Tensor:
    """All ranks' values, in the order of the global batch: (total, ...)."""
    world = accelerator.num_processes
    if world == 1:
        return values
    most = -(-total // world)
    padded = torch.zeros(most, *values.shape[1:], dtype=values.dtype, device=values.device)
    padded[: len(values)] = values
    gathered = accelerator.gather(padded[None])  # (world, most, ...)
    return gathered.transpose(0, 1).reshape(most * world, *values.shape[1:])[:total]
