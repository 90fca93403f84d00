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
    all_rows: int  # in all steps of the run, as far as that is known beforehand
    tokens: int
    scored: int
    longest: int  # the batch with the most tokens
    longest_tokens: int
    last: int = 0  # rows of an epoch's last batch, which takes what is left
    part: str = "epoch"  # what `per_epoch`, and counts over an epoch, are of; a block of a stream

    @classmethod
    def of(cls, data: Dataset, order: Batches, total: int, *, part: str = "epoch", rows_a_step: int | None = None) -> "Steps":
        """`rows_a_step`: of every step, where batches go on from one part to the next."""
        lengths, scored = data.lengths.sum(1), data.scored.sum(1)
        batches = [order.batch(number) for number in range(min(order.batches_per_epoch, max(1, total)))]
        tokens = [int(lengths[batch].sum()) for batch in batches]
        longest = int(np.argmax(tokens))
        read = sum(int(scored[batch].sum()) for batch in batches)
        rows, (parts, rest) = sum(map(len, batches)), divmod(total, order.batches_per_epoch)
        all_rows = rows_a_step * total if rows_a_step else parts * rows + sum(map(len, batches[:rest]))
        return cls(total, order.batches_per_epoch, rows, all_rows, sum(tokens), read, longest, tokens[longest],
                   len(batches[-1]), part)  # fmt: skip

    @property
    def all_tokens(self) -> int:
        """The tokens of all steps, estimated where they have more rows than were counted."""
        return round(self.tokens * self.all_rows / self.rows)

    def lines(self) -> list[tuple[str, str]]:
        """Return a line each on the epochs where there are several, on the tokens and on the longest batch, with their names."""
        several = self.all_rows > self.rows
        whole = (
            f"{'about ' if several else ''}{self.all_tokens:,} in all steps, {self.all_tokens / max(1, self.total):,.0f} a step"
        )
        epoch = f"{self.tokens:,} {self._a_part}; " if self.total >= self.per_epoch else ""
        scored = f"; {self.scored / self.tokens:.0%} of them scored" if self.scored else ""
        longest = f"a batch of {self.longest_tokens:,} tokens, in step {self.longest + 1}"
        return [
            *self._epochs(),
            ("tokens", epoch + whole + scored),
            ("longest", longest + (f" of the first {self.part}" if several else "")),
        ]

    def _epochs(self) -> list[tuple[str, str]]:
        if self.total <= self.per_epoch or self.part != "epoch":
            return []
        fewer = f", the last on {self.last}" if self.per_epoch > 1 and self.last < self.rows / self.per_epoch else ""
        steps = f"{self.per_epoch} steps" if self.per_epoch > 1 else "1 step"
        return [("epochs", f"{self.total / self.per_epoch:.3g}, each of {steps} on {self.rows:,} items{fewer}")]

    @property
    def _a_part(self) -> str:
        return f"a{'n' if self.part == 'epoch' else ''} {self.part}"

    def facts(self, batch_size: int) -> list[Fact]:
        epochs = self.all_rows / self.rows if self.total >= self.per_epoch else self.total / self.per_epoch
        part = self._a_part if self.total >= self.per_epoch else "all steps"
        scored = f"{self.scored:,} of them scored" if self.scored else ""
        return [
            Fact(
                "steps",
                f"{self.total:,}",
                f"each of {batch_size} items; {self.per_epoch:,} {self._a_part}, {epochs:.3g} {self.part}{'s' * (epochs != 1)}",
            ),
            Fact(f"tokens of {part}", f"{self.tokens:,}", scored),
            Fact("tokens of all steps", f"{self.all_tokens:,}", f"{self.all_tokens / max(1, self.total):,.0f} a step"),
            Fact("longest batch", f"{self.longest_tokens:,} tokens", f"in step {self.longest + 1} of the first {self.part}"),
        ]


def longest_batches(data: Dataset, order: Batches, total: int) -> Sequence[np.ndarray]:
    """The batches that may hold the largest micro-batch."""
    longest = data.lengths.sum(1)
    batches = [order.batch(number) for number in range(min(order.batches_per_epoch, max(1, total)))]
    return sorted(batches, key=lambda batch: -int(longest[batch].max()))[:TRIED]
