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


def test_an_unparsable_answer_is_no_verdict() -> None:
    assert [rollout.score.verdict for rollout in measure.with_verdicts(SAMPLES, [pair(0, 1, None)])] == [None] * 4


def test_the_verdict_on_each_of_several_answers_is_its_own() -> None:
    held = [Sample(HELD.prompt, n, f"held {n}") for n in range(3)]
    pairs = [{**pair(n, n, "A"), "prompt_id": "h", "split": "eval", "won": won} for n, won in ((0, 1.0), (1, 0.0))]
    assert [each.score.verdict for each in measure.with_verdicts(held, pairs)] == ["preferred", "not preferred", None]


def test_examples_show_the_best_and_the_worst_of_several_answers() -> None:
    held = [Rollout(Sample(Prompt(name, ASKED, "eval"), n, "so"), Score(float(n))) for name in "ab" for n in (1, 0, 2)]
    assert [(each.prompt.id, each.reward) for each in measure.examples(held, 8)] == [("a", 2), ("a", 0), ("b", 2), ("b", 0)]
    assert measure.examples(held[:1], 8) == held[:1]


def test_examples_show_the_preferred_answer_first(tmp_path: Path) -> None:
    shown = measure.examples(measure.with_verdicts(SAMPLES, [pair(2, 0, "B")]), 3)
    assert [rollout.sample.number for rollout in shown] == [0, 2]
    measure.write_examples(tmp_path, shown, "round 0", ["reward 0.5 (0.4 to 0.6)"])
    assert "held out: reward 0.5 (0.4 to 0.6)" in (tmp_path / "samples.html").read_text()
    lines = (tmp_path / "samples.md").read_text().splitlines()
    assert lines[2] == "held out: reward 0.5 (0.4 to 0.6)"
    assert [line.split("|")[2].strip() for line in lines[-2:]] == ["preferred", "not preferred"]
    assert json.dumps([rollout.shown() for rollout in shown])
