"""Splits a global batch over ranks and then into micro-batches, and gathers results in the batch's order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from halos.data.collate import is_branch
from halos.examples import Item
from halos.trainers import dealing
from halos.trainers.ahead import Later
from halos.transfer import to_device
from halos.types import HostSequences


class Rows(Protocol):
    """The rows that batches are taken from: a whole Dataset, or in a live loop what the current step has sampled."""

    groups: np.ndarray  # (rows,): rows of one prompt share a number
    prompt_lengths: np.ndarray  # (rows,) tokens
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
    scored: np.ndarray  # (completions,) scored tokens of the items' first completions, their second ones, ...
    weight: float
    seed: int
    packed: Later[HostSequences]  # the items' rows
    rollouts: Any = None  # the items' RolloutBatch, set by a policy gradient trainer


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a micro-batch may hold: items, tokens, or both; None: any number. An item of more tokens goes alone."""

    items: int | None
    tokens: int | None
    share: bool = False  # a prompt that several completions have in common counts once
    together: bool = True  # where it does, its items are side by side, if possible on one rank; not so in earlier versions

    def cut(self, rows: Rows, indices: np.ndarray) -> list[np.ndarray]:
        """Cut items into consecutive micro-batches, of which each holds as many as it may: arrays of positions in `indices`.

        A pure function of the items' lengths and groups.
        """
        prompts, own, trunks = rows.prompt_lengths[indices], *self.tokens_of(rows, indices)
        parts, start, tokens, held = list[np.ndarray](), 0, 0, set[tuple[int, int]]()
        for position, trunk in enumerate(zip(rows.groups[indices].tolist(), prompts.tolist(), strict=True)):
            more = int(own[position]) + (0 if trunk in held else int(trunks[position]))
            if position > start and self._is_over(position + 1 - start, tokens + more):
                parts.append(np.arange(start, position))
                start, tokens, held = position, 0, set()
                more = int(own[position] + trunks[position])
            tokens += more
            held |= {trunk} if trunks[position] else set()
        return [*parts, np.arange(start, len(indices))] if len(indices) else []

    def tokens_of(self, rows: Rows, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each item the tokens that are its own, and those of the prompt that it shares: (items,) each."""
        prompts, lengths = rows.prompt_lengths[indices], rows.lengths[indices]
        if not self.share:
            return lengths.sum(1), np.zeros(len(indices), np.int64)
        completions = lengths - prompts[:, None]
        branches = is_branch(prompts[:, None], completions)
        return (completions + np.where(branches, 0, prompts[:, None])).sum(1), np.where(branches.any(1), prompts, 0)

    def deal(self, rows: Rows, indices: np.ndarray, world: int) -> list[list[np.ndarray]]:
        """Deal items to ranks: for each rank its micro-batches, arrays of positions in `indices`."""
        groups, (own, trunks) = rows.groups[indices], self.tokens_of(rows, indices)
        if self.share and self.together and len(np.unique(groups)) < len(groups):
            positions = dealing.together(own, trunks, groups, world)
        else:
            positions = dealing.by_turns(len(indices), world)
        return [[mine[part] for part in self.cut(rows, indices[mine])] for mine in positions]

    def _is_over(self, items: int, tokens: int) -> bool:
        return (self.items is not None and items > self.items) or (self.tokens is not None and tokens > self.tokens)


def split_into_microbatches(
    split: Split, indices: np.ndarray, accelerator: Accelerator, *, bounds: Bounds, seeds: tuple[int, int],
    pack: Callable[[Sequence[Item]], HostSequences],
) -> list[MicroBatch]:  # fmt: skip
    """This rank's micro-batches of a global batch, as many items in each as its bounds allow.

    Every rank gets the same number, so that all call the same collectives; a rank without items left gets the batch's first item
    with weight 0. `seeds` (the run's, the step) make a micro-batch's dropout a function of step, rank and number. `pack` gets its
    items when their turn comes, or in a thread before that.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    dealt = bounds.deal(split.rows, indices, world)
    own, microbatches = dealt[rank], []
    for number in range(max(map(len, dealt))):
        weight = 1.0 if number < len(own) else 0.0
        positions = own[number] if weight else np.zeros(1, np.int64)
        rows, partners = indices[positions], split.mismatched_partners
        partner_items = [split.rows[int(i)] for i in partners[rows]] if partners is not None else []
        seed = int(np.random.SeedSequence([*seeds, rank, number]).generate_state(1, np.uint64)[0] >> 1)
        items, scored = [split.rows[int(i)] for i in rows], split.rows.scored[rows].sum(0)
        packed = Later(partial(pack, items))
        microbatches.append(MicroBatch(items, partner_items, positions, scored, weight, seed, packed))
    return microbatches


def gather_in_order(values: Tensor, positions: np.ndarray, total: int, accelerator: Accelerator) -> Tensor:
    """All ranks' values, in the order of the global batch: (total, ...). `positions` are those of this rank's values in it."""
    world = accelerator.num_processes
    if world == 1 and np.array_equal(positions, np.arange(total)):
        return values
    whole = values.new_zeros(total, *values.shape[1:])
    whole[to_device(torch.from_numpy(positions), values.device)] = values
    return whole if world == 1 else accelerator.reduce(whole, reduction="sum")
