"""Pairs, labels and scores from scored samples, as HALOs writes them."""

from typing import Any

import pytest

from halos.config.defaults import section
from halos.config.schema import Feedback
from halos.data.files import Row as DataRow
from halos.data.formats import read_example
from halos.errors import UserError
from halos.rollout import feedback
from halos.rollout.feedback import Pair, check_threshold
from halos.rollout.types import Rollout
from halos.types import Comparison, Demonstration, Judgement, Scored

DEFAULTS: dict[str, Any] = {"kind": "pairwise", "seed": 0}


def make(rows: list[dict[str, Any]], *, kind: str, seed: int, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """As files have it, of what files have."""
    rollouts = [Rollout.from_row(row, "here") for row in rows]
    made, counts = feedback.make(rollouts, section(Feedback, **settings), kind=kind, seed=seed)
    return [each.to_row() for each in made], counts


def samples(*groups: list[float | None]) -> list[dict[str, Any]]:
    return [
        {"prompt_id": f"p{g}", "sample_id": n, "prompt": [{"role": "user", "content": f"q{g}"}], "output": f"answer {g} {n}",
         "reward": reward, "seed": 7, "labeller": "me", "generator": "model", "output_ids": [n], "logps": [-1.0]}
        for g, group in enumerate(groups) for n, reward in enumerate(group)
    ]  # fmt: skip


def rewards(row: dict[str, Any]) -> tuple[float, float]:
    """Of the preferred and the other."""
    both = row["reward_A"], row["reward_B"]
    return both if row["label"] else (both[1], both[0])


def test_max_pairs_the_best_with_the_worst() -> None:
    rows, counts = make(samples([0.1, 0.9, 0.5], [1.0, 1.0]), **DEFAULTS)
    assert [rewards(row) for row in rows] == [(0.9, 0.1)]
    assert counts == {"without_score": 0, "groups": 2, "groups_all_equal": 1, "empty": 0, "rows": 1}
    assert rows[0]["reward_difference"] == pytest.approx(0.8)
    example = read_example(DataRow(rows[0], "x"), score="last")
    assert isinstance(example, Comparison)
    assert (example.chosen[0]["content"], example.margin) == ("answer 0 1", pytest.approx(0.8))


def test_min_pairs_the_two_that_are_closest_and_still_differ() -> None:
    rows, _ = make(samples([0.0, 0.3, 0.35, 1.0, 1.0]), **{**DEFAULTS, "pairing": "min"})
    assert [rewards(row) for row in rows] == [(0.35, 0.3)]
    rows, _ = make(samples([0.0, 0.3, 0.35, 1.0]), **{**DEFAULTS, "pairing": "min", "threshold": 0.1})
    assert [rewards(row) for row in rows] == [(0.3, 0.0)]


def test_random_pairs_every_sample_at_most_once() -> None:
    rows, _ = make(samples([0.0, 1.0, 2.0, 3.0, 4.0]), **{**DEFAULTS, "pairing": "random"})
    used = [row[name] for row in rows for name in ("sample_id_A", "sample_id_B")]
    assert len(used) == len(set(used)) == 4
    assert all(better > worse for better, worse in map(rewards, rows))
    other, _ = make(samples([0.0, 1.0, 2.0, 3.0, 4.0]), **{**DEFAULTS, "pairing": "random", "seed": 3})
    assert other != rows


def test_equal_scores_are_all_desirable_however_their_mean_is_rounded() -> None:
    assert sum([0.1] * 3) / 3 > 0.1
    for count in (3, 4, 6, 41):
        rows, _ = make(samples([0.1] * count), kind="binary", seed=0)
        assert [row["label"] for row in rows] == [1] * count


def test_labels_that_a_statistic_makes_desirable_all_are_warned_of() -> None:
    def warned(rewards: list[float], threshold: Any) -> bool:
        _, counts = make(samples(list(rewards)), kind="binary", seed=0, threshold=threshold)
        return feedback.all_desirable(counts, threshold) is not None

    assert warned([0.0] * 4, None), "all may be wrong"
    assert warned([0.0, 0.0, 0.0, 1.0], "median"), "most are"
    assert not warned([0.0, 0.0, 0.0, 1.0], "mean")
    assert not warned([1.0] * 4, 0.5), "a number says which are right"
    assert feedback.all_desirable({"rows": 4}, None) is None, "of pairs, rewards and older versions"


def test_the_order_of_a_and_b_is_drawn() -> None:
    rows, _ = make(samples(*[[0.0, 1.0]] * 60), **DEFAULTS)
    assert 15 < sum(row["label"] for row in rows) < 45
    assert {rewards(row) for row in rows} == {(1.0, 0.0)}


def test_empty_samples_are_counted_and_left_out_where_text_is_trained_on() -> None:
    given = samples([0.0, 1.0, 0.5])
    given[0]["output"] = " "
    for kind, rows in (("pairwise", 1), ("binary", 2), ("scalar", 3)):
        made, counts = make(given, **{**DEFAULTS, "kind": kind})
        assert (len(made), counts.get("empty", 0)) == (rows, 0 if kind == "scalar" else 1)


def test_a_difference_must_exceed_the_threshold_and_a_sample_must_have_a_score() -> None:
    rows, counts = make(samples([0.0, 0.5, None], [None, 1.0]), **{**DEFAULTS, "threshold": 0.5})
    assert rows == []
    assert counts["without_score"] == 2


@pytest.mark.parametrize(
    ("threshold", "labels"), [(None, [0, 0, 1]), ("mean", [0, 0, 1]), ("median", [0, 1, 1]), (0.05, [1, 1, 1])]
)
def test_labels_by_mean_median_or_number(threshold: Any, labels: list[int]) -> None:
    given = samples([0.1, 0.2, 0.9])
    rows, _ = make(given, **{**DEFAULTS, "kind": "binary", "threshold": threshold})
    assert [row["label"] for row in rows] == labels
    assert isinstance(read_example(DataRow(rows[0], "x"), score="last"), Judgement)


def test_scores_keep_tokens_and_where_they_come_from() -> None:
    rows, _ = make(samples([0.1, 0.2]), **{**DEFAULTS, "kind": "scalar"})
    example = read_example(DataRow(rows[1], "x"), score="last")
    assert isinstance(example, Scored)
    assert (example.reward, example.ids, example.logps) == (0.2, (1,), (-1.0,))
    assert [rows[0][name] for name in ("labeller", "generator", "seed", "prompt_id", "cost")] == ["me", "model", 7, "p0", 0.0]


def test_rows_of_feedback_carry_the_temperature_of_each_sample() -> None:
    """Without it nobody can tell which softmax their log-probs are of."""
    given = [{**row, "temperature": 0.7} for row in samples([0.1, 0.9])]
    for kind in ("scalar", "binary"):
        rows, _ = make(given, **{**DEFAULTS, "kind": kind})
        assert [row["temperature"] for row in rows] == [0.7, 0.7]
    example = read_example(DataRow(make(given, **{**DEFAULTS, "kind": "scalar"})[0][0], "x"), score="last")
    assert isinstance(example, Scored)
    assert example.temperature == 0.7
    given[1]["temperature"] = 1.3
    (pair,), _ = make(given, **DEFAULTS)
    assert {pair["sample_id_A"]: pair["temperature_A"], pair["sample_id_B"]: pair["temperature_B"]} == {0: 0.7, 1: 1.3}
    rows, _ = make(samples([0.1, 0.9]), **{**DEFAULTS, "kind": "scalar"})
    assert "temperature" not in rows[0], "other tools need not say it"


def test_groups_of_equal_scores_stay_unless_drop_equal() -> None:
    given = samples([1.0, 1.0], [0.0, 1.0])
    assert [len(make(given, **{**DEFAULTS, "kind": "scalar", "drop_equal": drop})[0]) for drop in (False, True)] == [4, 2]


def test_samples_that_were_cut_are_kept_masked_or_dropped() -> None:
    """The best and the worst of a group of four were cut."""
    given = samples([0.0, 0.2, 0.6, 1.0])
    for row, finish in zip(given, ("length", "stop", "stop", "length"), strict=True):
        row["finish"] = finish

    def made(kind: str, truncated: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
        rows = [Rollout.from_row(row, "here") for row in given]
        result, counts = feedback.make(rows, section(Feedback), kind=kind, seed=0, truncated=truncated)
        return [each.to_row() for each in result], counts

    assert [rewards(row) for row in made("pairwise", "keep")[0]] == [(1.0, 0.0)]
    assert made("pairwise", "mask")[0] == [], "the best of all is paired with the worst of all, and both were cut"
    assert [rewards(row) for row in made("pairwise", "drop")[0]] == [(0.6, 0.2)]
    labels = {
        each: [(row["sample_id"], row["label"], row["threshold"]) for row in made("binary", each)[0]] for each in ("keep", "mask")
    }
    assert labels == {"keep": [(0, 0, 0.45), (1, 0, 0.45), (2, 1, 0.45), (3, 1, 0.45)], "mask": [(1, 0, 0.45), (2, 1, 0.45)]}
    assert [(row["label"], row["threshold"]) for row in made("binary", "drop")[0]] == [(0, 0.4), (1, 0.4)]
    scores = {each: [row.get("masked") for row in made("scalar", each)[0]] for each in ("keep", "mask", "drop")}
    assert scores == {"keep": 4 * [None], "mask": [True, None, None, True], "drop": 2 * [None]}
    assert [made("scalar", each)[1].get("cut") for each in ("keep", "mask", "drop")] == [None, 2, 2]
    masked = read_example(DataRow(made("scalar", "mask")[0][0], "x"), score="last")
    assert isinstance(masked, Scored)
    assert (masked.masked, masked.reward, masked.cut) == (True, 0.0, True)
    assert Demonstration.of(masked) == [], "nothing of it is learned, by imitation neither"


def test_samples_of_evaluation_prompts_are_not_trained_on() -> None:
    given = samples([0.0, 1.0])
    assert make([{**row, "split": "eval"} for row in given], **DEFAULTS)[0] == []


def test_a_preference_without_scores_keeps_its_winner_in_either_order() -> None:
    one, other = (Rollout.from_row({**row, "reward": None}, "here") for row in samples([0.0, 0.0]))
    for swapped in (False, True):
        for better in (False, True):
            row = Pair(one, other, swapped, better).to_row()
            assert "reward_A" not in row
            winner = row["output_A"] if row["label"] else row["output_B"]
            assert winner[0]["content"] == ("answer 0 0" if better else "answer 0 1")


def test_a_wrong_threshold_is_refused() -> None:
    assert check_threshold("binary", "0.5") == 0.5
    with pytest.raises(UserError, match="takes a number, not 'mean'"):
        check_threshold("pairwise", "mean")
    with pytest.raises(UserError, match="mean, median or a number"):
        check_threshold("binary", "half")
