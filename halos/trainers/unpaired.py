"""Judgements: completions labelled one by one, desirable or not."""

from collections.abc import Mapping, Sequence

import torch

from halos.data.collate import PackRow
from halos.data.dataset import Item
from halos.trainers.base import Trainer
from halos.trainers.deal import Chunk
from halos.types import Labelled, TokenLogps


class UnpairedTrainer(Trainer):
    """For losses whose first parameter is Labelled."""

    takes = (Labelled,)

    def rows(self, items: Sequence[Item]) -> list[PackRow]:
        return [(item.prompt, item.completions[0]) for item in items]

    def inputs(self, output: TokenLogps, chunk: Chunk) -> Labelled:
        return Labelled(output, torch.tensor([item.desirable for item in chunk.items], device=output.values.device))

    @staticmethod
    def derived(means: Mapping[str, float]) -> dict[str, float]:
        both = "rewards/chosen" in means and "rewards/rejected" in means
        return {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]} if both else {}
