"""How a global batch is dealt out: to processes, then into micro-batches, and put together again in its order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from halos.data.dataset import Dataset, Item


@dataclass(frozen=True, slots=True)
class Split:
    """Tokenised rows, and for each the row whose completion it is mismatched with, where the loss wants that."""

    rows: Dataset
    partners: np.ndarray | None  # (rows,)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A micro-batch of one process. `weight` is 0 for one that only keeps the process in step with the others."""

    items: Sequence[Item]
    partners: Sequence[Item]
    num_scored: int
    weight: float
    seed: int


def deal(split: Split, indices: np.ndarray, accelerator: Accelerator, *, size: int, seeds: tuple[int, int]) -> list[Chunk]:
    """This process's micro-batches of a global batch: items rank::world, at most `size` a time.

    Every process gets as many, so that all make the same collectives; one that has run out of items gets the first item
    of the batch with weight 0. `seeds` (the run's, the step) make each chunk's dropout a function of where it stands.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    mine, most = indices[rank::world], -(-len(indices) // world)
    chunks = []
    for number, start in enumerate(range(0, most, size)):
        some = mine[start : start + size]
        weight = 1.0 if len(some) else 0.0
        some = some if len(some) else indices[:1]
        partners = [split.rows[int(i)] for i in split.partners[some]] if split.partners is not None else []
        seed = int(np.random.SeedSequence([*seeds, rank, number]).generate_state(1, np.uint64)[0] >> 1)
        items = [split.rows[int(i)] for i in some]
        chunks.append(Chunk(items, partners, int(split.rows.scored[some].sum()), weight, seed))
    return chunks


def gather_in_order(mine: Tensor, total: int, accelerator: Accelerator) -> Tensor:
    """Every process's values, interleaved as the global batch was dealt out: (total, ...)."""
    world = accelerator.num_processes
    if world == 1:
        return mine
    most = -(-total // world)
    padded = torch.zeros(most, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
    padded[: len(mine)] = mine
    everyone = accelerator.gather(padded[None])  # (world, most, ...)
    return everyone.transpose(0, 1).reshape(most * world, *mine.shape[1:])[:total]
