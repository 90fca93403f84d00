"""Comparisons: the chosen completions of a micro-batch first, then the rejected ones."""

from collections.abc import Sequence

from halos.data.collate import PackRow
from halos.data.dataset import Item
from halos.trainers.base import Trainer
from halos.trainers.deal import Chunk
from halos.types import Pair, TokenLogps


def both(items: Sequence[Item]) -> list[PackRow]:
    """Every chosen row, then every rejected row."""
    return [(item.prompt, item.completions[which]) for which in (0, 1) for item in items]


class PairedTrainer(Trainer):
    """For losses whose first parameter is a Pair."""

    takes = (Pair,)

    def rows(self, items: Sequence[Item]) -> list[PackRow]:
        return both(items)

    def inputs(self, output: TokenLogps, chunk: Chunk) -> Pair:
        return Pair(*output.split(len(chunk.items)))
