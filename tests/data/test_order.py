import numpy as np
import pytest

from halos.data.order import Order, eval_batches, mismatched_partners
from halos.errors import UserError


def order(sizes=(10,), weights=None, batch_size: int = 4, seed: int = 0) -> Order:
    sources = np.repeat(np.arange(len(sizes)), sizes)
    return Order(sources, weights or [1.0] * len(sizes), batch_size, seed)


def test_an_epoch_holds_every_row_once_and_the_last_batch_is_what_is_left():
    made = order()
    assert made.batches_per_epoch == 3
    batches = [made.batch(k) for k in range(3)]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(np.concatenate(batches)) == list(range(10))


def test_epochs_and_seeds_differ_and_the_same_seed_gives_the_same_rows():
    assert order().epoch(0).tolist() == order().epoch(0).tolist()
    assert order().epoch(0).tolist() != order().epoch(1).tolist()
    assert order().epoch(0).tolist() != order(seed=1).epoch(0).tolist()


def test_a_batch_does_not_depend_on_earlier_calls():
    walked = order()
    straight = [walked.batch(k).tolist() for k in range(9)]
    for k in (8, 0, 5, 3, 5):
        assert order().batch(k).tolist() == straight[k]
        assert walked.batch(k).tolist() == straight[k]


def test_the_rows_of_all_ranks_together_are_the_global_batch_however_many_there_are():
    made = order(sizes=(23,), batch_size=8)
    for world in (1, 2, 3, 8):
        for k in range(6):
            held = [made.batch(k)[rank::world] for rank in range(world)]
            assert sorted(np.concatenate(held)) == sorted(made.batch(k))


def test_the_order_is_that_of_saved_runs():
    # Worked once and kept: a change here would silently move every run that is resumed.
    assert order().epoch(0).tolist() == [7, 6, 8, 3, 2, 4, 1, 5, 0, 9]


def test_a_weight_decides_how_often_the_rows_of_a_source_come():
    made = order(sizes=(10, 10, 10), weights=[1, 0.5, 2.3], batch_size=7)
    assert made.rows_per_epoch == 10 + 5 + 23
    counts = [np.bincount(made.epoch(e), minlength=30) for e in range(40)]
    for count in counts:
        assert count[:10].tolist() == [1] * 10
        assert sorted(count[10:20]) == [0] * 5 + [1] * 5
        assert sorted(count[20:]) == [2] * 7 + [3] * 3
    total = np.sum(counts, axis=0)
    assert total[10:20].min() > 0, "another half each epoch"
    assert abs(total[20:] - 92).max() < 15


def test_sources_are_mixed_and_not_concatenated():
    places = np.flatnonzero(order(sizes=(500, 500), batch_size=10).epoch(0) < 500)
    assert 450 < places.mean() < 550


def test_weights_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="leave no row"):
        order(sizes=(2,), weights=[0.1])


def test_evaluation_sees_every_row_once_in_order():
    assert [batch.tolist() for batch in eval_batches(np.zeros(5, int), 2)] == [[0, 1], [2, 3], [4]]
    assert [batch.tolist() for batch in eval_batches(np.array([0, 0, 0, 1, 3, 3]), 2)] == [[0, 1], [2], [3], [4, 5]]


def test_evaluation_keeps_groups_whole_within_a_source_however_rows_are_ordered():
    groups, sources = np.array([5, 2, 5, 2, 9, 9, 9, 5, 1]), np.array([0] * 7 + [1, 1])
    assert [batch.tolist() for batch in eval_batches(sources, 4, groups)] == [[0, 2, 1, 3], [4, 5, 6], [7, 8]]
    assert [batch.tolist() for batch in eval_batches(sources, 2, groups)] == [[0, 2], [1, 3], [4, 5, 6], [7, 8]]
    assert eval_batches(sources[:0], 2, groups[:0]) == []


# --- mismatched partners -----------------------------------------------------------------------------------------------


def test_a_partner_never_has_the_same_prompt():
    for seed in range(20):
        groups = np.random.default_rng(seed).integers(0, 2 + seed, 101)
        found = mismatched_partners(groups, seed, what="kto")
        assert found.shape == groups.shape
        assert (groups[found] != groups).all()


def test_all_rows_of_other_prompts_are_equally_likely():
    groups = np.array([7, 0, 7, 3, 0, 7])
    counts = np.zeros((6, 6), int)
    for seed in range(3000):
        counts[np.arange(6), mismatched_partners(groups, seed, what="kto")] += 1
    for row, group in enumerate(groups):
        others = groups != group
        assert counts[row, ~others].sum() == 0
        assert abs(counts[row, others] - 3000 / others.sum()).max() < 200, "six standard deviations"


def test_partners_are_fixed_by_the_seed():
    groups = np.arange(50)
    assert mismatched_partners(groups, 3, what="kto").tolist() == mismatched_partners(groups, 3, what="kto").tolist()
    assert mismatched_partners(groups, 3, what="kto").tolist() != mismatched_partners(groups, 4, what="kto").tolist()


def test_one_prompt_alone_has_no_partner():
    with pytest.raises(
        UserError, match="mine pairs each prompt with a completion of another, and all 9 rows have the same prompt"
    ):
        mismatched_partners(np.zeros(9, int), 0, what="data.eval: mine")
    assert mismatched_partners(np.array([0, 1]), 0, what="mine").tolist() == [1, 0]
