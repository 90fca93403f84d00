"""A global batch split over ranks and micro-batches is gathered in its order."""

from collections.abc import Sequence
from itertools import combinations_with_replacement, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halos.data.collate import pack
from halos.examples import Completion
from halos.trainers.dealing import SLACK, together
from halos.trainers.microbatches import Bounds, MicroBatch, Split, gather_in_order, split_into_microbatches


class Rows:
    """Pairs of which three each have one prompt."""

    scored = np.ones((100, 1), dtype=np.int64)
    groups = np.arange(100) // 3
    prompt_lengths = 5 + np.arange(100) // 3
    lengths = prompt_lengths[:, None] + np.random.default_rng(0).integers(1, 9, (100, 2))

    def __getitem__(self, row: int) -> int:
        return row


def split(
    indices: np.ndarray, rank: int, world: int, size: int | None, tokens: int | None = None, *, share: bool = False,
    seeds: tuple[int, int] = (0, 0),
) -> list[MicroBatch]:  # fmt: skip
    accelerator: Any = SimpleNamespace(process_index=rank, num_processes=world)
    bounds = Bounds(size, tokens, share)
    given_: Any = Split(Rows(), None)  # type: ignore[arg-type]
    return split_into_microbatches(given_, indices, accelerator, bounds=bounds, seeds=seeds, pack=tuple)  # type: ignore[arg-type]


def tokens_of(items: Sequence[Any], *, share: bool) -> int:
    """Of these pairs: every completion, and the prompt of each, or of each group."""
    completions = sum(int((Rows.lengths[item] - Rows.prompt_lengths[item]).sum()) for item in items)
    prompts = {int(Rows.groups[item]): int(Rows.prompt_lengths[item]) for item in items}
    return completions + (sum(prompts.values()) if share else sum(2 * int(Rows.prompt_lengths[item]) for item in items))


@given(
    count=st.integers(1, 40), world=st.integers(1, 4), size=st.none() | st.integers(1, 6), tokens=st.none() | st.integers(1, 120),
    share=st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_a_micro_batch_holds_as_many_items_as_its_bounds_allow(
    count: int, world: int, size: int | None, tokens: int | None, share: bool
) -> None:
    indices = np.random.default_rng(count).permutation(100)[:count]
    first = {group: place for place, group in reversed(list(enumerate(Rows.groups[indices].tolist())))}
    side_by_side = sorted(indices.tolist(), key=lambda item: first[Rows.groups[item]])
    dealt = list[int]()
    for rank in range(world):
        parts = [list(each.items) for each in split(indices, rank, world, size, tokens, share=share) if each.weight]
        dealt += (own := [item for part in parts for item in part])
        assert share or own == indices[rank::world].tolist()
        for number, part in enumerate(parts):
            fits = [(size is None or len(some) <= size) and (tokens is None or tokens_of(some, share=share) <= tokens)
                    for some in (part, [*part, *parts[number + 1][:1]] if number + 1 < len(parts) else [])]  # fmt: skip
            assert fits[0] or len(part) == 1, "a longer item goes alone"
            assert number + 1 == len(parts) or not fits[1], "the next would have fitted"
    assert not share or len(first) == count or dealt == side_by_side, "siblings, in the order of the batch"


@given(count=st.integers(1, 9), world=st.integers(1, 4), seed=st.integers(0, 99))
@settings(deadline=None)
def test_siblings_are_dealt_together_where_that_keeps_the_balance(count: int, world: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    groups, own = np.sort(random.integers(0, 4, count)), random.integers(1, 40, count)
    prompts = random.integers(1, 60, 4)[groups]

    def cost(part: np.ndarray) -> int:
        return int(own[part].sum() + sum({int(groups[item]): int(prompts[item]) for item in part}.values()))

    parts = together(own, prompts, groups, world)
    assert np.concatenate(parts).tolist() == list(range(count))
    every_cut = combinations_with_replacement(range(count + 1), world - 1)
    ways = [[np.arange(start, end) for start, end in pairwise([0, *cuts, count])] for cuts in every_cut]
    least = min(max(map(cost, way)) for way in ways)
    assert max(map(cost, parts)) <= least * (1 + SLACK)


def test_a_prompt_is_split_only_for_balance() -> None:
    groups, own = np.repeat(np.arange(4), 8), np.full(32, 30)
    numbers = [[len(np.unique(groups[part])) for part in together(own, np.full(32, 100), groups, world)] for world in (2, 3, 8)]
    assert numbers[0] == [2, 2]
    assert numbers[1] == [1, 2, 2], "560, 560 and 340 tokens, where 530 at most need two prompts twice"
    assert numbers[2] == [1] * 8
    (one, other) = together(own[:8], np.full(8, 100), groups[:8], 2)
    assert (len(one), len(other)) == (4, 4), "a single prompt's completions are shared by all ranks"


@given(seed=st.integers(0, 2**20), share=st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_tokens_of_a_micro_batch_are_those_that_its_rows_are_packed_into(seed: int, share: bool) -> None:
    """Of completions too long to share their prompt, and pairs of which one is."""
    random = np.random.default_rng(seed)
    groups, sizes = random.integers(0, 3, 12), random.integers(1, 30, 3)
    lengths = sizes[groups][:, None] + random.integers(1, 500, (12, 2))
    rows: Any = SimpleNamespace(groups=groups, prompt_lengths=sizes[groups], lengths=lengths)

    def packed(items: Sequence[int]) -> int:
        given_ = [(np.full(sizes[groups[i]], groups[i]), int(end - sizes[groups[i]])) for i in items for end in lengths[i]]
        return len(pack([(prompt, Completion(np.ones(n), np.ones(n, bool))) for prompt, n in given_], share=share).ids)

    parts = [part.tolist() for part in Bounds(None, 1500, share).cut(rows, np.arange(12))]
    assert [item for part in parts for item in part] == list(range(12))
    for part, following in zip(parts, [*parts[1:], []], strict=True):
        assert packed(part) <= 1500 or len(part) == 1
        assert not following or packed([*part, following[0]]) > 1500


@pytest.mark.parametrize("tokens", [None, 40])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 11])
def test_every_item_is_used_once_and_every_rank_gets_as_many_micro_batches(world: int, count: int, tokens: int | None) -> None:
    ranks = [split(np.arange(count), rank, world, 2, tokens) for rank in range(world)]
    assert len({len(microbatches) for microbatches in ranks}) == 1
    real = sorted(item for microbatches in ranks for each in microbatches if each.weight for item in each.items)
    assert real == list(range(count))


def test_no_two_micro_batches_of_any_run_step_or_rank_share_a_dropout_seed() -> None:
    seeds = [each.seed for run in range(3) for step in range(5) for rank in range(2)
             for each in split(np.arange(8), rank, 2, 2, seeds=(run, step))]  # fmt: skip
    assert len(set(seeds)) == len(seeds) == 3 * 5 * 2 * 2


def test_a_rank_without_items_gets_a_padding_micro_batch_of_weight_zero() -> None:
    (padding,) = split(np.arange(1), 1, 2, 4)
    assert (padding.weight, list(padding.items)) == (0.0, [0])


@pytest.mark.parametrize(("world", "count"), [(2, 5), (3, 7), (4, 2)])
def test_gathered_values_are_in_the_order_of_the_batch(world: int, count: int) -> None:
    positions, tables = np.array_split(np.random.default_rng(0).permutation(count), world), list[torch.Tensor]()

    def reduce(table: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        tables.append(table)
        return torch.stack(tables).sum(0)

    accelerator: Any = SimpleNamespace(num_processes=world, reduce=reduce)
    for own in positions:  # the last rank has what all have added
        gathered = gather_in_order(torch.from_numpy(own).float(), own, count, accelerator)
    assert gathered.tolist() == list(range(count))


def test_one_rank_gathers_what_was_dealt_in_another_order() -> None:
    accelerator: Any = SimpleNamespace(num_processes=1)
    order = np.array([2, 0, 1])
    assert gather_in_order(torch.tensor([[2.0], [0.0], [1.0]]), order, 3, accelerator).tolist() == [[0.0], [1.0], [2.0]]
