"""Means over micro-batches, ranks and steps: a metric that some ranks lack is counted where it is."""

from collections.abc import Callable
from threading import Barrier, Thread
from typing import Any

import torch
from torch import Tensor

from halos.metrics import Meter
from halos.types import Mean


class Ranks:
    """Two ranks as threads, whose collectives take tables of one size alone."""

    def __init__(self) -> None:
        self.barrier, self.given = Barrier(2, timeout=20), dict[int, Any]()
        self.collectives = 0

    def together(self, rank: int, value: Any) -> list[Any]:
        self.given[rank] = value
        self.barrier.wait()
        values = [self.given[0], self.given[1]]
        self.collectives += rank == 0
        self.barrier.wait()
        return values

    def run(self, of_rank: Callable[[int], Any]) -> list[Any]:
        results = dict[int, Any]()
        threads = [Thread(target=lambda rank=rank: results.update({rank: of_rank(rank)}), daemon=True) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return [results.get(rank) for rank in (0, 1)]


def test_ranks_with_different_metrics_sum_each_by_its_name() -> None:
    ranks, meters = Ranks(), (Meter(), Meter())

    def step(*names: tuple[str, ...]) -> list[Any]:
        def of_rank(rank: int) -> dict[str, tuple[float, float]]:
            def reduce(table: Tensor) -> Tensor:
                tables = ranks.together(rank, table)
                assert tables[0].shape == tables[1].shape
                return tables[0] + tables[1]

            meters[rank].add({name: Mean.of(torch.full((2,), 10.0 * rank + 1)) for name in names[rank]})
            return meters[rank].reduce(reduce, lambda own: [name for each in ranks.together(rank, own) for name in each])

        return ranks.run(of_rank)

    both = {"loss": (24.0, 4.0)}
    first = {**both, "only/0": (2.0, 2.0), "only/1": (22.0, 2.0)}
    assert step(("loss", "only/0"), ("loss", "only/1")) == [first, first]
    later = {**both, "only/0": (2.0, 2.0)}
    ranks.collectives = 0
    assert step(("loss", "only/0"), ("loss",)) == [later, later]
    assert ranks.collectives == 1, "names that are known cost nothing"
    third = {**both, "third": (22.0, 2.0)}
    assert step(("loss",), ("loss", "third")) == [third, third]
