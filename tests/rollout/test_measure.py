"""What a judge that compares has made of samples: numbers and words for people."""

import json
from pathlib import Path
from typing import Any

from halos.rollout import measure

SAMPLES = [{"prompt_id": "p", "sample_id": n, "prompt": "?", "output": f"answer {n}", "split": "train"} for n in range(4)]
HELD = {"prompt_id": "h", "sample_id": 0, "prompt": "?", "output": "held", "split": "eval"}


def pair(first: int, second: int, verdict: str | None) -> dict[str, Any]:
    return {"prompt_id": "p", "sample_id_A": first, "sample_id_B": second, "verdict": verdict}


def test_each_sample_has_the_judges_verdict() -> None:
    pairs = [pair(2, 0, "B"), pair(1, 3, "tie"), {**pair(0, 0, "A"), "prompt_id": "h", "split": "eval", "won": 1.0}]
    rows = measure.judged([*SAMPLES, HELD], pairs)
    said = [row.get("verdict") for row in rows]
    assert said == ["preferred", "tie", "not preferred", "tie", "preferred"]


def test_what_could_not_be_read_is_no_verdict() -> None:
    assert [row.get("verdict") for row in measure.judged(SAMPLES, [pair(0, 1, None)])] == [None] * 4


def test_people_are_shown_the_answer_that_won_before_the_one_that_lost(tmp_path: Path) -> None:
    shown = measure.examples(measure.judged(SAMPLES, [pair(2, 0, "B")]), 3)
    assert [row["sample_id"] for row in shown] == [0, 2]
    measure.write_examples(tmp_path, shown, "round 0")
    lines = (tmp_path / "samples.md").read_text().splitlines()
    assert [line.split("|")[2].strip() for line in lines[-2:]] == ["preferred", "not preferred"]
    assert json.dumps(shown)
