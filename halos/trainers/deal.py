"""How a global batch is dealt out: to processes, then into micro-batches, and put together again in its order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from halos.examples import Item


class Rows(Protocol):
    """What a step needs of rows: a Dataset's, or those that a live run has just sampled."""

    groups: np.ndarray  # (rows,)
    scored: np.ndarray  # (rows, completions)
    lengths: np.ndarray  # (rows, completions)
    labels: dict[str, np.ndarray]  # (rows,) each

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Item: ...

    def lines(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Split:
    """Tokenised rows, and for each the row whose completion it is mismatched with, where the loss wants that."""

    rows: Rows
    partners: np.ndarray | None  # (rows,)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A micro-batch of one process. `weight` is 0 for one that only keeps the process in step with the others."""

    items: Sequence[Item]
    partners: Sequence[Item]
    places: np.ndarray  # (items,) where in the global batch they stand
    num_scored: int
    weight: float
    seed: int
    given: Any = None  # what a trainer knows of these items besides


def deal(split: Split, indices: np.ndarray, accelerator: Accelerator, *, size: int, seeds: tuple[int, int]) -> list[Chunk]:
    """This process's micro-batches of a global batch: items rank::world, at most `size` a time.

    Every process gets as many, so that all make the same collectives; one that has run out of items gets the first item
    of the batch with weight 0. `seeds` (the run's, the step) make each chunk's dropout a function of where it stands.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    mine, most = np.arange(len(indices))[rank::world], -(-len(indices) // world)
    chunks = []
    for number, start in enumerate(range(0, most, size)):
        places = mine[start : start + size]
        weight = 1.0 if len(places) else 0.0
        places = places if len(places) else np.zeros(1, np.int64)
        some = indices[places]
        partners = [split.rows[int(i)] for i in split.partners[some]] if split.partners is not None else []
        seed = int(np.random.SeedSequence([*seeds, rank, number]).generate_state(1, np.uint64)[0] >> 1)
        items = [split.rows[int(i)] for i in some]
        chunks.append(Chunk(items, partners, places, int(split.rows.scored[some].sum()), weight, seed))
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
