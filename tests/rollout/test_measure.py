"""Verdicts of a judge that compares, as metrics and as examples for people."""

import json
from pathlib import Path
from typing import Any

from halos.rollout import measure
from halos.rollout.types import Prompt, Rollout, Sample, Score

ASKED = ({"role": "user", "content": "?"},)
SAMPLES = [Sample(Prompt("p", ASKED, "train"), n, f"answer {n}") for n in range(4)]
HELD = Sample(Prompt("h", ASKED, "eval"), 0, "held")


def pair(first: int, second: int, verdict: str | None) -> dict[str, Any]:
    return {"prompt_id": "p", "sample_id_A": first, "sample_id_B": second, "verdict": verdict}


def test_each_sample_has_the_judges_verdict() -> None:
    pairs = [pair(2, 0, "B"), pair(1, 3, "tie"), {**pair(0, 0, "A"), "prompt_id": "h", "split": "eval", "won": 1.0}]
    said = [rollout.score.verdict for rollout in measure.with_verdicts([*SAMPLES, HELD], pairs)]
    assert said == ["preferred", "tie", "not preferred", "tie", "preferred"]


def test_a_near_tie_counts_half_in_either_direction() -> None:
    """Sums of the same parts in another order: 0.1 + 0.2 and 0.3, or nothing at all."""
    for one, other in ((0.3, 0.1 + 0.2), (0.0, 0.1 + 0.2 - 0.3)):
        before, now = ([Rollout(HELD, Score(value))] for value in (one, other))
        assert measure.win_rate(now, before) == measure.win_rate(before, now) == 0.5
    better, worse = ([Rollout(HELD, Score(value))] for value in (0.31, 0.3))
    assert (measure.win_rate(better, worse), measure.win_rate(worse, better)) == (1.0, 0.0)


def test_an_unparsable_answer_is_no_verdict() -> None:
    assert [rollout.score.verdict for rollout in measure.with_verdicts(SAMPLES, [pair(0, 1, None)])] == [None] * 4


def test_examples_show_the_preferred_answer_first(tmp_path: Path) -> None:
    shown = measure.examples(measure.with_verdicts(SAMPLES, [pair(2, 0, "B")]), 3)
    assert [rollout.sample.number for rollout in shown] == [0, 2]
    measure.write_examples(tmp_path, shown, "round 0")
    lines = (tmp_path / "samples.md").read_text().splitlines()
    assert [line.split("|")[2].strip() for line in lines[-2:]] == ["preferred", "not preferred"]
    assert json.dumps([rollout.shown() for rollout in shown])
