"""A global batch dealt out to processes comes together again in its order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from halos.trainers import deal
from halos.trainers.deal import Split


class Rows:
    scored = np.ones((100, 1), dtype=np.int64)

    def __getitem__(self, row: int) -> int:
        return row


def dealt(indices: np.ndarray, rank: int, world: int, size: int, seeds: tuple[int, int] = (0, 0)) -> list[deal.Chunk]:
    place = SimpleNamespace(process_index=rank, num_processes=world)
    return deal.deal(Split(Rows(), None), indices, place, size=size, seeds=seeds)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 11])
def test_every_item_is_dealt_once_and_every_process_gets_as_many_chunks(world: int, count: int) -> None:
    everyone = [dealt(np.arange(count), rank, world, 2) for rank in range(world)]
    assert len({len(chunks) for chunks in everyone}) == 1
    real = sorted(item for chunks in everyone for chunk in chunks if chunk.weight for item in chunk.items)
    assert real == list(range(count))


def test_no_two_micro_batches_of_any_run_step_or_process_drop_the_same() -> None:
    seeds = [chunk.seed for run in range(3) for step in range(5) for rank in range(2)
             for chunk in dealt(np.arange(8), rank, 2, 2, (run, step))]  # fmt: skip
    assert len(set(seeds)) == len(seeds) == 3 * 5 * 2 * 2


def test_a_process_without_rows_keeps_in_step_with_weight_zero() -> None:
    (chunk,) = dealt(np.arange(1), 1, 2, 4)
    assert (chunk.weight, list(chunk.items)) == (0.0, [0])


@pytest.mark.parametrize(("world", "count"), [(2, 5), (3, 7), (4, 2)])
def test_gathered_values_stand_in_the_order_of_the_batch(world: int, count: int) -> None:
    most = -(-count // world)
    shares = [torch.arange(count)[rank::world].float() for rank in range(world)]
    padded = torch.stack([torch.nn.functional.pad(share, (0, most - len(share))) for share in shares])
    place = SimpleNamespace(process_index=0, num_processes=world, gather=lambda _: padded)
    assert deal.gather_in_order(shares[0], count, place).tolist() == list(range(count))  # type: ignore[arg-type]
