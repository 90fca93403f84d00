"""Means that are exact over micro-batches, ranks and steps: totals and counts are summed, and divided once."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from halos.types import Mean


class Meter:
    """Accumulates `Mean`s on their device; `reduce` turns them into totals over all ranks, in one collective."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, means: Mapping[str, Mean], weight: float = 1.0) -> None:
        """Weight 0 adds only the names: a rank without rows then reports the same names as the others."""
        for name, mean in means.items():
            pair = torch.stack([mean.total.detach().double(), mean.count.detach().double()])
            pair = pair if weight else torch.zeros_like(pair)
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def reduce(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """name -> (total, count); resets the meter."""
        names = sorted(self._sums)
        table = over_ranks(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums = {}
        return {name: (total, count) for name, (total, count) in zip(names, table, strict=True)}


class Window:
    """Totals since the last logged step."""

    def __init__(self) -> None:
        self.totals: dict[str, list[float]] = {}

    def add(self, totals: Mapping[str, tuple[float, float]]) -> None:
        for name, (total, count) in totals.items():
            sums = self.totals.setdefault(name, [0.0, 0.0])
            sums[0] += total
            sums[1] += count

    def means(self) -> dict[str, float]:
        """total / count of each; a mean whose count is 0 (KTO with one class only) is left out."""
        return {name: total / count for name, (total, count) in self.totals.items() if count}
