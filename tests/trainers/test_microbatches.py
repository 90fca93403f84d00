"""A global batch split over ranks and micro-batches is gathered in its order."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from halos.trainers.microbatches import MicroBatch, Split, gather_in_order, split_into_microbatches


class Rows:
    scored = np.ones((100, 1), dtype=np.int64)

    def __getitem__(self, row: int) -> int:
        return row


def split(indices: np.ndarray, rank: int, world: int, size: int, seeds: tuple[int, int] = (0, 0)) -> list[MicroBatch]:
    accelerator: Any = SimpleNamespace(process_index=rank, num_processes=world)
    return split_into_microbatches(Split(Rows(), None), indices, accelerator, size=size, seeds=seeds)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 11])
def test_every_item_is_used_once_and_every_rank_gets_as_many_micro_batches(world: int, count: int) -> None:
    ranks = [split(np.arange(count), rank, world, 2) for rank in range(world)]
    assert len({len(microbatches) for microbatches in ranks}) == 1
    real = sorted(item for microbatches in ranks for each in microbatches if each.weight for item in each.items)
    assert real == list(range(count))


def test_no_two_micro_batches_of_any_run_step_or_rank_share_a_dropout_seed() -> None:
    seeds = [each.seed for run in range(3) for step in range(5) for rank in range(2)
             for each in split(np.arange(8), rank, 2, 2, (run, step))]  # fmt: skip
    assert len(set(seeds)) == len(seeds) == 3 * 5 * 2 * 2


def test_a_rank_without_items_gets_a_padding_micro_batch_of_weight_zero() -> None:
    (padding,) = split(np.arange(1), 1, 2, 4)
    assert (padding.weight, list(padding.items)) == (0.0, [0])


@pytest.mark.parametrize(("world", "count"), [(2, 5), (3, 7), (4, 2)])
def test_gathered_values_are_in_the_order_of_the_batch(world: int, count: int) -> None:
    most = -(-count // world)
    shards = [torch.arange(count)[rank::world].float() for rank in range(world)]
    padded = torch.stack([torch.nn.functional.pad(shard, (0, most - len(shard))) for shard in shards])
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=world, gather=lambda _: padded)
    assert gather_in_order(shards[0], count, accelerator).tolist() == list(range(count))
