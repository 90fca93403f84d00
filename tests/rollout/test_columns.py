"""Columns of the data arrive at reward functions as they were, in live loops and through the files of rounds."""

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from halos.config.defaults import section
from halos.config.schema import Scorer
from halos.data.files import Row
from halos.errors import UserError
from halos.rollout.prompts import _data_of, columns_digest, content_hashes, digest, drawn_after, eval_prompts, read_prompts
from halos.rollout.rows import as_json
from halos.rollout.scorers._evaluate import row_of
from halos.rollout.scorers._reward_functions import parts_of
from halos.rollout.scorers.function import Functions
from halos.rollout.types import Origin, Prompt, Rollout, Sample, Score, requests_for

WHOLE = {
    "prompt": "Add!", "solution": 7, "tests": [{"in": [1, 2], "out": 3}], "extra_info": {"level": 2.5, "tags": []}, "note": None,
    # names that a sample has too, or a score
    "output": "mine", "seed": 3, "tokens": "all", "temperature": 9.0, "split": "test", "type": "code", "output_ids": [9],
    "finish": "never", "logps": [0.5], "reward": 1.0, "problem": "an easy one", "data": {"data": 1}, "samples": 5,
}  # fmt: skip


def written(path: Path, *rows: dict[str, Any]) -> list[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def sampled(prompt: Prompt) -> Sample:
    [request] = requests_for([prompt], samples=1, temperature=0.5, max_new_tokens=4, seed=0)
    return Sample.of(request, Origin("policy", "v"), "3", finish="stop", tokens=2, ids=(5, 1), logps=(-1.0, -2.0))


def through_files(prompt: Prompt, place: Path) -> Sample:
    [again] = read_prompts(written(place / "prompts.jsonl", prompt.to_row()), "train")
    line = json.dumps(sampled(again).to_row(), ensure_ascii=False)
    return Sample.from_row(json.loads(line), "samples.jsonl:1")


def test_every_column_arrives_with_its_type_in_both_loops_and_none_is_taken_for_a_key_of_the_sample(tmp_path: Path) -> None:
    read = read_prompts(written(tmp_path / "rows.jsonl", WHOLE), "train")
    [prompt] = drawn_after(read, 0, count=1, samples=1, seed=0)
    live, of_rounds = row_of(sampled(prompt)), row_of(through_files(prompt, tmp_path))
    assert live == of_rounds
    assert live["data"] == WHOLE
    own = {"output": "3", "output_ids": [5, 1], "finish": "stop", "tokens": 2, "split": "train", "temperature": 0.5,
           "type": "sample", "prompt": [{"role": "user", "content": "Add!"}], "solution": "7", "sample_id": 0}  # fmt: skip
    assert {name: live[name] for name in own} == own
    assert live["seed"] not in (3, None)
    assert "logps" not in live
    bare = row_of(Sample(prompt, 0, "3"))  # of a tool that counts no tokens and draws with no seed
    assert not {"tokens", "seed", "finish", "temperature"} & bare.keys(), "the data's are under `data` alone"
    assert (live["tests"], live["extra_info"], live["problem"]) == (WHOLE["tests"], WHOLE["extra_info"], "an easy one")


def test_a_score_keeps_its_own_keys_beside_columns_of_their_names_and_leaves_the_data_with_the_samples(tmp_path: Path) -> None:
    [prompt] = read_prompts(written(tmp_path / "rows.jsonl", WHOLE), "train")
    rollout = Rollout(sampled(prompt), Score(0.25, scorer="ends"))
    row = rollout.to_row()
    assert (row["reward"], row.get("problem"), row.get("data")) == (0.25, None, None)
    earlier = {"prompt_id": "p", "prompt": "?", "output": "!", "reward": 1.0, "parts": {"x": 1.0}, "mine": 4}
    again = Rollout(Sample.from_row(earlier, "here"), Score(0.5)).to_row()
    assert (again["reward"], again.get("parts"), again["mine"]) == (0.5, None, 4), "of the new score, not of an earlier one"


def test_values_that_json_does_not_have_become_what_the_manual_says() -> None:
    import numpy as np

    when = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    given = {"when": when, "day": when.date(), "raw": b"\x00\xff", "nan": float("nan"), "far": -float("inf"), "pair": (1, 2.5),
             "some": {"b", "a"}, "array": np.arange(2), "one": np.float32(0.5), "yes": np.bool_(True), 3: "three"}  # fmt: skip
    assert as_json(given) == {
        "when": "2026-01-02T03:04:00+00:00", "day": "2026-01-02", "raw": "AP8=", "nan": None, "far": "-inf", "pair": [1, 2.5],
        "some": ["a", "b"], "array": [0, 1], "one": 0.5, "yes": True, "3": "three",
    }  # fmt: skip
    assert json.loads(json.dumps(as_json(given), allow_nan=False)) == as_json(given)


def test_a_custom_format_hides_no_column_and_a_prompts_file_written_by_hand_has_its_own() -> None:
    converted = Row({"prompt": "so?"}, "here", original={"question": "so?", "tests": [1]})
    assert _data_of(converted) == {"question": "so?", "tests": [1], "prompt": "so?"}
    by_hand = Row({"type": "prompt", "prompt": "so?", "samples": 3, "tests": [1], "solution": "2"}, "here")
    assert _data_of(by_hand) == {"tests": [1]}


def test_rows_of_one_prompt_with_other_columns_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "One?", "tests": [1]}, {"prompt": "One?", "tests": [2]}, {"prompt": "One?", "tests": [1]}]
    with caplog.at_level(logging.WARNING):
        [prompt] = read_prompts(written(tmp_path / "a.jsonl", *rows), "train")
    assert prompt.data["tests"] == [1]
    assert "data.train: 1 of its rows have the prompt of an earlier row and another tests (" in caplog.text
    assert f"{tmp_path}/a.jsonl:2 after {tmp_path}/a.jsonl:1): the first row" in caplog.text


def test_other_columns_change_a_hash_of_their_own_and_none_that_earlier_versions_recorded(tmp_path: Path) -> None:
    one, other = (read_prompts(written(tmp_path / "a.jsonl", {**WHOLE, "tests": tests}), "train") for tests in ([1], [2]))
    plain = [Prompt("a.jsonl:1", ({"role": "user", "content": "Add!"},), columns={"solution": "7"})]
    assert digest(one) == digest(other) == digest(plain)
    assert columns_digest(one) != columns_digest(other)
    assert content_hashes(one, [], "function") == {
        "data.train": digest(one), "data.train.columns": columns_digest(one), "data.eval": None, "data.eval.columns": None,
    }  # fmt: skip
    assert content_hashes(one, [], "judge")["data.train.columns"] is None, "whose scores depend on no column"


def test_prompts_of_an_earlier_version_are_read_as_they_were(tmp_path: Path) -> None:
    row = {"type": "prompt", "prompt_id": "p", "prompt": [{"role": "user", "content": "?"}], "solution": "2", "samples": 1}
    [prompt] = read_prompts(written(tmp_path / "prompts.jsonl", row), "train")
    assert prompt.to_row() == row
    assert row_of(sampled(prompt))["data"] == {"solution": "2"}
    [held_out] = eval_prompts([prompt], count=1, seed=0)
    assert through_files(held_out, tmp_path).prompt.is_eval


def test_a_column_that_no_prompt_has_is_named_before_anything_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ownreads.py").write_text(
        "def flat(completion, row): return row['hidden']\n"
        "def nested(completion, row): return row['data']['hidden']\n"
        "def own(completion, row): return row['generator_sha256']\n"
        "def optional(completion, row): return float(row.get('hint', 'none') in completion.split('=')[1])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    prompts = read_prompts(written(tmp_path / "a.jsonl", {"prompt": "?", "tests": [], "generator_sha256": "theirs"}), "train")
    every = set(row_of(sampled(prompts[0]))) | {"split"}
    (tmp_path / "ownreads.py").open("a").write(f"def every(completion, row): return len([row[name] for name in {every}])\n")
    for name in ("every", "optional"):  # has all that a sample has; raises for what a made-up answer is, and not for a column
        Functions(parts_of([f"ownreads.{name}"], ["ownreads"]), section(Scorer), ["ownreads"]).check_prompts(prompts)
    for name, said in (
        ("flat", "ownreads.flat needs a column `hidden`, and none of the 1 prompts of data.train has one"),
        ("nested", "ownreads.nested needs a column `hidden`"),
        ("own", "`generator_sha256` of a sample (the column of the data with that name is row['data']['generator_sha256'])"),
    ):
        functions = Functions(parts_of([f"ownreads.{name}"], ["ownreads"]), section(Scorer), ["ownreads"])
        with pytest.raises(UserError) as error:
            functions.check_prompts(prompts)
        assert said in str(error.value)
