"""Which checkpoints may go."""

import hypothesis.strategies as st
from hypothesis import given

from halos.checkpoint.retention import expendable


def test_the_newest_and_the_best_are_kept() -> None:
    scores = {10: 0.9, 20: 0.5, 30: 0.7, 40: None, 50: 0.6}
    assert expendable(scores, keep_last=1, keep_best=2, largest=True) == [20, 40]
    assert expendable(scores, keep_last=2, keep_best=1, largest=False) == [10, 30]


def test_of_equal_scores_the_newer_is_kept() -> None:
    assert expendable({1: 0.5, 2: 0.5, 3: 0.1}, keep_last=1, keep_best=1, largest=True) == [1]


@given(
    st.dictionaries(st.integers(0, 99), st.none() | st.floats(-1, 1), min_size=1),
    st.integers(0, 5),
    st.integers(0, 5),
    st.booleans(),
)
def test_never_fewer_than_one_and_the_bound_holds(scores: dict[int, float | None], last: int, best: int, largest: bool) -> None:
    kept = set(scores) - set(expendable(scores, keep_last=last, keep_best=best, largest=largest))
    assert max(scores) in kept
    assert len(kept) <= max(1, last) + best
    scored = [value for value in scores.values() if value is not None]
    if best and scored:
        assert (max if largest else min)(scored) in [scores[step] for step in kept]
