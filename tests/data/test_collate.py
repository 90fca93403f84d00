import numpy as np
import pytest
import torch

from halos.data.collate import mismatched_row, num_truncated_mismatches, pack
from halos.examples import Completion, Item

ALL = object()


def row(prompt: list[int], ids: list[int], scored=ALL):
    marks = np.ones(len(ids), bool) if scored is ALL else np.array(scored, bool)
    return np.array(prompt, np.int32), Completion(np.array(ids, np.int32), marks)


def test_sequences_are_packed_end_to_end_and_each_scored_token_is_predicted_from_the_one_before():
    packed = pack([row([1, 2], [3, 4, 5]), row([6], [7, 8, 9], [True, False, True])])
    assert packed.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert packed.lengths == (5, 4)
    assert packed.targets.tolist() == [3, 4, 5, 7, 9]
    assert packed.sources.tolist() == [1, 2, 3, 5, 7]
    assert packed.rows.tolist() == [0, 0, 0, 1, 1]
    assert packed.columns.tolist() == [0, 1, 2, 0, 1]
    assert packed.widest == 3
    assert all(
        getattr(packed, name).dtype == torch.int64 for name in ("ids", "positions", "targets", "sources", "rows", "columns")
    )


def test_the_first_token_of_a_sequence_without_a_prompt_is_not_scored():
    packed = pack([row([1], [2]), row([], [3, 4]), row([5], [6, 7])])
    assert packed.targets.tolist() == [2, 4, 6, 7]
    assert packed.sources.tolist() == [0, 2, 4, 5], "never the last token of the sequence before"
    assert packed.rows.tolist() == [0, 1, 2, 2]
    assert packed.columns.tolist() == [0, 0, 0, 1]


def test_a_row_keeps_its_index_after_rows_without_scored_tokens():
    packed = pack([row([1], [2, 3], [False, False]), row([4], [5])])
    assert packed.rows.tolist() == [1]
    assert packed.widest == 1


def test_packing_does_not_change_a_sequence():
    rng = np.random.default_rng(0)
    rows = [
        row([*rng.integers(0, 99, p)], [*rng.integers(0, 99, c)], rng.random(c) < 0.7) for p, c in rng.integers(1, 9, (20, 2))
    ]
    together = pack(rows)
    for number, each in enumerate(rows):
        alone = pack([each])
        mine = together.rows == number
        start = sum(together.lengths[:number])
        assert torch.equal(together.targets[mine], alone.targets)
        assert torch.equal(together.sources[mine] - start, alone.sources)
        assert torch.equal(together.columns[mine], alone.columns)
        assert torch.equal(together.positions[start : start + len(alone.ids)], alone.positions)


def item(prompt: int, completion: int) -> Item:
    ids = np.arange(completion, dtype=np.int32)
    return Item(np.full(prompt, 50, np.int32), (Completion(ids, np.ones(completion, bool)),), "")


def test_a_mismatched_row_joins_a_prompt_and_the_completion_of_another_within_max_length():
    prompt, completion = mismatched_row(item(4, 2), item(9, 5), 7)
    assert prompt.tolist() == [50] * 4
    assert completion.ids.tolist() == [0, 1, 2]
    assert len(completion.scored) == 3
    assert mismatched_row(item(4, 2), item(9, 5), 9)[1].ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("max_length", [4, 7, 9, 11, 30])
def test_the_number_of_truncated_mismatches_agrees_with_building_them(max_length: int):
    items = [item(p, c) for p, c in ((3, 4), (1, 9), (2, 2), (3, 1))]
    partners = np.array([1, 2, 3, 0])
    made = [mismatched_row(items[n], items[m], max_length) for n, m in enumerate(partners)]
    cut = sum(len(completion.ids) < len(items[m].completions[0].ids) for (_, completion), m in zip(made, partners, strict=True))
    prompts = np.array([len(each.prompt) for each in items])
    lengths = prompts + [len(each.completions[0].ids) for each in items]
    assert num_truncated_mismatches(prompts, lengths, partners, max_length) == cut
