"""Demonstrations: one completion a row, scored token by token."""

import math
from collections.abc import Mapping, Sequence

from halos.data.collate import PackRow
from halos.data.dataset import Item
from halos.trainers.base import Trainer
from halos.trainers.deal import Chunk
from halos.types import TokenLogps


class SFTTrainer(Trainer):
    """For losses whose first parameter is TokenLogps."""

    takes = (TokenLogps,)

    def rows(self, items: Sequence[Item]) -> list[PackRow]:
        return [(item.prompt, item.completions[0]) for item in items]

    def inputs(self, output: TokenLogps, chunk: Chunk) -> TokenLogps:
        return output

    @staticmethod
    def derived(means: Mapping[str, float]) -> dict[str, float]:
        return {"perplexity": math.exp(min(means["loss"], 700.0))}
