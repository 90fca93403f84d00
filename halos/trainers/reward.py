"""Comparisons scored by a reward model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from halos.data.collate import PackRow
from halos.data.dataset import Item
from halos.trainers.base import Trainer
from halos.trainers.deal import Chunk
from halos.trainers.paired import both
from halos.types import PairScores


class RewardTrainer(Trainer):
    """For losses whose first parameter is PairScores."""

    takes = (PairScores,)

    def rows(self, items: Sequence[Item]) -> list[PackRow]:
        return both(items)

    def inputs(self, output: Tensor, chunk: Chunk) -> PairScores:
        margin = torch.tensor([item.margin for item in chunk.items], dtype=torch.float32, device=output.device)
        return PairScores(output[: len(chunk.items)], output[len(chunk.items) :], margin)
