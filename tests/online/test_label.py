"""The label command by itself: what it writes, and what it refuses without losing anything."""

from pathlib import Path
from typing import Any

import pytest

from halos.online.label import main as label
from halos.online.preferences import _matches
from halos.online.records import read, read_meta, write
from halos.rollout.prompts import eval_prompts
from halos.rollout.types import Prompt, Sample


def samples() -> list[dict[str, Any]]:
    return [{"prompt_id": f"p{n // 3}", "sample_id": n % 3, "prompt": "Say something!", "output": "so " * n, "type": "sample"}
            for n in range(6)]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write(tmp_path / "s.jsonl", samples())
    return tmp_path


def run(place: Path, *words: str, output: str = "f.jsonl") -> int:
    return label([str(place / "s.jsonl"), str(place / output), "--reward", "{function: length, target: 4}", *words])


def test_halos_own_files_are_read_and_written(place: Path) -> None:
    write(place / "s.json", [{"prompt_id": 0, "instruction": "Say!", "output": "so " * n, "sample_id": n} for n in (0, 2, 4)])
    command = [str(place / "s.json"), str(place / "f.json"), "--reward", "{function: length, target: 4}", "--feedback", "scalar"]
    assert label(command) == 0
    rows = read(place / "f.json")
    assert [row["reward"] for row in rows] == [0.0, 0.5, 1.0]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Say!"}]
    assert read_meta(place / "f.json")["rows"] == 3


def test_scores_and_feedback_name_the_weights_that_the_samples_were_written_of(place: Path) -> None:
    (place / "s.meta.json").write_text('{"request": {"model_sha256": "abc"}}')
    assert run(place, "--feedback", "scalar") == 0
    for name in ("f.jsonl", "f.scores.jsonl"):
        assert {row["generator_sha256"] for row in read(place / name)} == {"abc"}


def test_the_same_command_again_changes_nothing_and_another_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place) == 0
    before = read(place / "f.jsonl")
    assert run(place) == 0
    assert read(place / "f.jsonl") == before
    assert run(place, "--feedback", "binary") == 2
    assert "exists already" in capsys.readouterr().err
    assert read(place / "f.jsonl") == before


def test_a_date_is_refused_where_nothing_writes_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--date", "2031-05-07") == 2
    assert "--date has no effect with --reward, which has no chat template: leave it out" in capsys.readouterr().err


def test_samples_that_were_cut_are_left_out_as_the_command_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "s.jsonl", [{**row, "finish": "length" if row["sample_id"] == 2 else "stop"} for row in samples()])
    assert run(place, "--feedback", "scalar", "--truncated", "mask") == 0
    assert [row.get("masked") for row in read(place / "f.jsonl")] == 2 * [None, None, True]
    assert "2 cut ones masked" in capsys.readouterr().err
    assert run(place, "--feedback", "scalar", "--truncated", "drop", output="g.jsonl") == 0
    assert len(read(place / "g.jsonl")) == 4
    assert run(place, "--feedback", "scalar") == 2, "of another request"
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("truncated", "pairs"), [("keep", 2), ("mask", 1), ("drop", 2)])
def test_a_judge_compares_no_cut_samples_for_training_unless_they_are_kept(truncated: str, pairs: int) -> None:
    rows = [Sample(Prompt("p", ({"role": "user", "content": "?"},)), n, str(n), "length" if n == 1 else "stop") for n in range(5)]
    matches = _matches(rows, {}, 0, truncated)
    assert len(matches) == pairs
    assert any(1 in (each.one.number, each.other.number) for each in matches) == (truncated == "keep")


def test_the_file_of_samples_is_not_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, output="s.jsonl") == 2
    assert "is the samples' own file" in capsys.readouterr().err
    assert read(place / "s.jsonl") == samples()
    (place / "d").mkdir()
    assert run(place, output="d") == 2


def test_samples_without_numbers_are_numbered_and_duplicates_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "sample_id": None} for row in samples()]
    write(place / "s.jsonl", rows)
    assert run(place, "--feedback", "scalar") == 0
    assert [row["sample_id"] for row in read(place / "f.jsonl")] == [0, 1, 2, 0, 1, 2]
    write(place / "s.jsonl", [samples()[0], samples()[0]])
    (place / "s.jsonl").write_text("\n\n".join((place / "s.jsonl").read_text().splitlines()))
    assert run(place, output="g.jsonl") == 2
    assert "s.jsonl:3: there is a sample 0 of prompt 'p0' already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"output": 5}, "output is '5'"),
        ({"sample_id": "abc"}, "sample_id is 'abc', not a whole number"),
        ({"prompt": 3}, "prompt is '3'"),
        ({"output": [{"text": "x"}]}, "it takes text or a list of messages"),
        ({"prompt": "Say something else!"}, "another prompt, at {}:1, has the prompt_id 'p0' too: give each its own"),
        ({"prompt_id": None}, "prompt_id is null, not text or a number"),
        ({"prompt_id": ["p0"]}, "prompt_id is ['p0'], not text or a number"),
        ({"output_ids": 5}, "output_ids is 5, not a list of whole numbers"),
        ({"output_ids": [1, "2"]}, "output_ids is [1, '2'], not a list of whole numbers"),
        ({"logps": "low"}, "logps is 'low', not a list of numbers"),
        ({"tokens": "many"}, "tokens is 'many', not a whole number"),
        ({"seed": True}, "seed is True, not a whole number"),
        ({"temperature": "hot"}, "temperature is 'hot', not a number"),
        ({"split": 1}, "split is 1, not text"),
    ],
)
def test_a_row_that_is_no_sample_is_refused_with_its_line(
    row: dict[str, Any], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "s.jsonl", [samples()[0], {**samples()[1], **row}])
    assert run(place) == 2
    error = capsys.readouterr().err
    assert "s.jsonl:2: " in error
    assert said.format(place / "s.jsonl") in error
    assert not (place / "f.scores.jsonl.partial").exists()


def test_answers_to_other_questions_are_not_compared(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    for name, prompt in (("s", "Say something!"), ("other", "Say something else!")):
        write(place / f"{name}.jsonl", [{"prompt_id": 7, "prompt": prompt, "output": name, "split": "eval"}])
    words = [str(place / "s.jsonl"), str(place / "f.jsonl"), "--judge", "j", "--url", "http://127.0.0.1:9/v1", "--pairwise"]
    assert label([*words, "--against", str(place / "other.jsonl")]) == 2
    assert "other.jsonl:1: its prompt_id '7' is that of another prompt in" in capsys.readouterr().err
    assert label([*words, "--threshold", "2"]) == 2
    assert "--threshold has no effect on the verdicts of a judge that compares: leave it out" in capsys.readouterr().err


def test_a_reward_runs_the_rows_own_tests_and_samples_without_a_score_are_counted_by_reason(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "owntests.py").write_text(
        "def passes(completion, row):\n"
        "    data = row['data']\n"
        "    if data['task'] == 'chat': return None\n"
        "    return sum(bool(eval(test, {'text': completion})) for test in data['tests']) / len(data['tests'])\n"
        "def shares(completions, rows): return [len(completions)] * len(rows)\n"
    )
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PYTHONPATH", str(place))
    data = [{"task": "code", "tests": ["'so' in text", "len(text) > 5"]}] * 3 + [
        {"task": "chat"},
        {"task": "code"},
        {"task": "code"},
    ]
    write(place / "s.jsonl", [{**row, "data": each} for row, each in zip(samples(), data, strict=True)])
    own = ["--reward", "owntests.passes", "--plugins", "owntests", "--feedback", "scalar", "--processes", "1"]
    assert label([str(place / "s.jsonl"), str(place / "f.jsonl"), *own]) == 0
    assert [row["reward"] for row in read(place / "f.scores.jsonl")] == [0.0, 0.5, 1.0, None, None, None]
    said = "3 of 6 samples have no score: 2 x owntests.passes raised KeyError, 1 x no reward function applies"
    assert said in capsys.readouterr().err
    meta = read_meta(place / "f.scores.jsonl")
    assert meta["problems"] == {"owntests.passes raised KeyError": 2, "no reward function applies": 1}
    assert (meta["scored"], meta["without_score"]) == (3, 3)
    grouped = ["--reward", "owntests.shares", *own[2:], "--aggregation", "sum"]
    assert label([str(place / "s.jsonl"), str(place / "g.jsonl"), *grouped]) == 0
    assert {row["reward"] for row in read(place / "g.jsonl")} == {3.0}


def test_where_no_sample_has_a_score_the_reason_is_the_error_and_no_feedback_is_written(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(place / "s.jsonl"), str(place / "f.jsonl"), "--reward", "{function: length, target: abc}"]
    for _ in range(2):
        assert label(words) == 2
        error = capsys.readouterr().err
        assert "none of 6 samples has a score: 6 x halos.online.rewards.length raised TypeError (the first: " in error
        assert not (place / "f.jsonl").exists()
        assert len(read(place / "f.scores.jsonl")) == 6


def test_where_no_sample_had_a_score_the_same_command_scores_them_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "serverdown.py").write_text(
        "from pathlib import Path\n"
        "def of(completion, row):\n"
        "    if not Path(__file__).with_name('up').exists(): raise ConnectionError\n"
        "    return float(len(completion))\n"
    )
    monkeypatch.syspath_prepend(str(place))
    words = [str(place / "s.jsonl"), str(place / "f.jsonl"), "--reward", "serverdown.of", "--plugins", "serverdown",
             "--feedback", "scalar", "--processes", "1"]  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(place))
    assert label(words) == 2
    (place / "up").touch()
    assert label(words) == 0
    assert all(row["reward"] is not None for row in read(place / "f.scores.jsonl"))
    before = (place / "f.scores.jsonl").stat().st_mtime_ns
    assert label(words) == 0
    assert (place / "f.scores.jsonl").stat().st_mtime_ns == before, "what has scores is not scored again"


def test_a_directory_that_cannot_be_created_is_refused_before_a_sample_is_scored(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, "--scores", str(place / "scores.jsonl"), output="s.jsonl/below/f.jsonl") == 2
    assert "s.jsonl/below cannot be created (Not a directory): name a file in" in capsys.readouterr().err
    assert not list(place.glob("scores*"))


def test_wrong_arguments_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--reward", "{function: length"], "--reward cannot be read"),
        (["--reward", ""], "--reward '' names nothing: it takes a function of halos.online.rewards"),
        (["--threshold", "nan"], "takes a number, not 'nan'"),
        (["--pairwise"], "--pairwise needs --judge"),
        (["--against", "other.jsonl"], "--against has no effect without --pairwise"),
        (["--max-length", "9"], "--max-length has no effect with --reward"),
        (["--drop-equal"], "--drop-equal has no effect on pairwise feedback, which takes --pairing, --threshold: leave it out"),
        (
            ["--feedback", "scalar", "--threshold", "0.5"],
            "--threshold has no effect on scalar feedback, which takes --drop-equal",
        ),
        (["--feedback", "binary", "--pairing", "random"], "--pairing has no effect on binary feedback, which takes --threshold"),
        (["--processes", "0"], "--processes takes a whole number (at least 1), not 0"),
    ):
        assert run(place, *words) == 2
        assert said in capsys.readouterr().err


def test_no_held_out_prompts_are_none() -> None:
    assert eval_prompts([], count=5, seed=0) == []
