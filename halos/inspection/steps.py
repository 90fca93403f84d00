"""How many steps and tokens a run of a data set takes, and its longest batch: counted in its own first epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from halos.data.dataset import Dataset
from halos.inspection.facts import Fact

TRIED = 2000  # batches of which the micro-batches are counted, those with the longest rows


class Batches(Protocol):
    """The global batches of a run."""

    batches_per_epoch: int

    def batch(self, number: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Steps:
    """Counts over the first epoch, or over all steps of a shorter run. Tokens are those of prompt and completion of every row."""

    total: int  # steps of the run
    per_epoch: int
    rows: int  # in those steps
    tokens: int
    scored: int
    longest: int  # the batch with the most tokens
    longest_tokens: int

    @classmethod
    def of(cls, data: Dataset, order: Batches, total: int) -> "Steps":
        lengths, scored = data.lengths.sum(1), data.scored.sum(1)
        batches = [order.batch(number) for number in range(min(order.batches_per_epoch, max(1, total)))]
        tokens = [int(lengths[batch].sum()) for batch in batches]
        longest = int(np.argmax(tokens))
        return cls(total, order.batches_per_epoch, sum(map(len, batches)), sum(tokens),
                   sum(int(scored[batch].sum()) for batch in batches), longest, tokens[longest])  # fmt: skip

    @property
    def all_tokens(self) -> int:
        """The tokens of all steps, estimated where there are several epochs."""
        return round(self.tokens * self.total / min(self.per_epoch, max(1, self.total)))

    def lines(self) -> list[tuple[str, str]]:
        """Return a line each on the tokens and on the longest batch, with their names."""
        several = self.total > self.per_epoch
        whole = (
            f"{'about ' if several else ''}{self.all_tokens:,} in all steps, {self.all_tokens / max(1, self.total):,.0f} a step"
        )
        epoch = f"{self.tokens:,} an epoch; " if self.total >= self.per_epoch else ""
        scored = f"; {self.scored / self.tokens:.0%} of them scored" if self.scored else ""
        longest = f"a batch of {self.longest_tokens:,} tokens, in step {self.longest + 1}"
        return [("tokens", epoch + whole + scored), ("longest", longest + (" of the first epoch" if several else ""))]

    def facts(self, batch_size: int) -> list[Fact]:
        epochs = self.total / self.per_epoch
        part = "an epoch" if self.total >= self.per_epoch else "all steps"
        scored = f"{self.scored:,} of them scored" if self.scored else ""
        return [
            Fact("steps", f"{self.total:,}", f"each of {batch_size} items; {self.per_epoch:,} an epoch, {epochs:.3g} epochs"),
            Fact(f"tokens of {part}", f"{self.tokens:,}", scored),
            Fact("tokens of all steps", f"{self.all_tokens:,}", f"{self.all_tokens / max(1, self.total):,.0f} a step"),
            Fact("longest batch", f"{self.longest_tokens:,} tokens", f"in step {self.longest + 1} of the first epoch"),
        ]


def longest_batches(data: Dataset, order: Batches, total: int) -> Sequence[np.ndarray]:
    """The batches that may hold the largest micro-batch."""
    longest = data.lengths.sum(1)
    batches = [order.batch(number) for number in range(min(order.batches_per_epoch, max(1, total)))]
    return sorted(batches, key=lambda batch: -int(longest[batch].max()))[:TRIED]
