"""Means that are exact over micro-batches, ranks and steps: totals and counts are summed, and divided once."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from halos.types import Mean

PART = "loss/"  # before the names of the parts of a loss that is a sum


class Meter:
    """Accumulates `Mean`s on their device; `reduce` turns them into totals over all ranks, in one collective."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._names: list[str] = []  # known to every rank

    def add(self, means: Mapping[str, Mean], weight: float = 1.0) -> None:
        """Weight 0 adds only the names: a rank without rows then reports the same names as the others."""
        for name, mean in means.items():
            pair = torch.stack([mean.total.detach().double(), mean.count.detach().double()])
            pair = pair if weight else torch.zeros_like(pair)
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def reduce(
        self, over_ranks: Callable[[Tensor], Tensor], gather: Callable[[list[str]], list[str]]
    ) -> dict[str, tuple[float, float]]:
        """Return name -> (total, count) over all ranks, where it counts anything, and reset the sums. `over_ranks` sums a table,
        `gather` joins lists.

        A loss may return a metric on some ranks alone. So the table has a row for every name that any rank has ever had, and a
        last one that says whether a rank has a name that the others do not know yet: that costs two more collectives, once.
        """
        sums, self._sums = self._sums, {}
        *rows, (unknown, _) = over_ranks(_table(self._names, sums)).tolist()
        if unknown:
            self._names = sorted({*self._names, *gather(list(sums))})
            *rows, _ = over_ranks(_table(self._names, sums)).tolist()
        return {name: (total, count) for name, (total, count) in zip(self._names, rows, strict=True) if count}


def _table(names: Sequence[str], sums: Mapping[str, Tensor]) -> Tensor:
    """Stack the sums of `names`, 0 where there is none, and a row that is not 0 where there are sums of other names."""
    nothing = torch.zeros_like(next(iter(sums.values())))
    return torch.stack([*(sums.get(name, nothing) for name in names), nothing + len(sums.keys() - {*names})])


def loss_of(means: Mapping[str, float]) -> dict[str, float]:
    """The metric `loss` of a loss that is a sum, whose parts have means of their own; empty where it is there or nothing is."""
    parts = [value for name, value in means.items() if name.startswith(PART)]
    return {"loss": sum(parts)} if parts and "loss" not in means else {}


LARGEST_DIFFERENCE = "mismatch/max"  # a metric that is the largest of what it is over; the others are means


class Window:
    """Totals since the last logged step; of a metric that is the largest, the largest."""

    def __init__(self) -> None:
        self.totals: dict[str, list[float]] = {}

    def add(self, totals: Mapping[str, tuple[float, float]]) -> None:
        for name, (total, count) in totals.items():
            sums = self.totals.setdefault(name, [0.0, 0.0])
            if name == LARGEST_DIFFERENCE:
                sums[:] = [total if math.isnan(total) else max(sums[0], total), 1.0]
                continue
            sums[0] += total
            sums[1] += count

    def means(self) -> dict[str, float]:
        """total / count of each; a mean whose count is 0 (KTO with one class only) is left out."""
        means = {name: total / count for name, (total, count) in self.totals.items() if count}
        return {**loss_of(means), **means}
