"""A judge that is slow, busy, broken and answers nonsense: every answer is paid for once, and none is guessed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halos.config.defaults import section
from halos.config.schema import Config, Scorer
from halos.errors import UserError
from halos.online.label import main as label
from halos.online.records import read, read_meta, write
from halos.rollout import servers
from halos.rollout.scorers.judge import Answer, Judge, read_preference, read_score
from halos.rollout.types import Prompt, Sample

from .stub import Stub


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stub]]:
    """`stub(trouble=..., slow=..., fail=...)`: a server that runs until the test ends."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key")
    made: list[Stub] = []

    def start(**how: Any) -> Stub:
        made.append(Stub(**how))
        return made[-1]

    yield start
    for each in made:
        each.close()


def judge(stub: Stub, place: Path, *, pairwise: bool = False, **more: Any) -> Judge:
    given: dict[str, Any] = {"name": "judge", "model": "j", "url": stub.url, "concurrency": 8, "price_in": 1000.0,
                             "price_out": 10000.0, "pairwise": pairwise, **more}  # fmt: skip
    return Judge(section(Scorer, **given), place / "judge.jsonl")


def samples(count: int) -> list[Sample]:
    prompts = [Prompt(f"p{n}", ({"role": "user", "content": f"question {n}"},)) for n in range(count)]
    return [Sample(prompts[n // 2], n % 2, f"answer {n}") for n in range(count)]


def write_samples(path: Path, count: int) -> None:
    write(path, [sample.to_row() for sample in samples(count)])


def test_every_answer_comes_and_nonsense_is_counted(stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = stub(slow=0.005)
    asked = samples(80)
    found = {each.text: score for each, score in judge(server, tmp_path).score(asked)}
    assert len(found) == 80
    assert server.statuses[429] > 0
    assert server.statuses[500] > 0
    assert sum(server.paid.values()) == len(server.paid) == 80
    nothing = [score for score in found.values() if score.value is None]
    assert len(nothing) == sum("cut off" in _kind(text) or "nonsense" in _kind(text) for text in server.seen)
    assert nothing
    assert all("the judge gave no score from 0 to 10" in score.problem for score in nothing)
    assert all(score.cost == pytest.approx(0.2) for score in found.values())  # 100 tokens read and 10 written


def _kind(text: str) -> str:
    import hashlib

    return {2: "cut off", 3: "nonsense"}.get(int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10, "score")


def test_an_answered_question_is_never_asked_again(stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = stub()
    first = {each.text: score for each, score in judge(server, tmp_path).score(samples(20))}
    again = judge(server, tmp_path)
    more = {each.text: score for each, score in again.score(samples(24))}
    assert {text: more[text] for text in first} == first
    assert sum(server.paid.values()) == 24
    assert again.spent == pytest.approx(24 * 0.2)


def test_equal_questions_are_one(stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = stub(trouble=False)
    rows = samples(2) + samples(2)
    assert len(list(judge(server, tmp_path).score(rows))) == 4
    assert sum(server.paid.values()) == 2


@pytest.mark.parametrize(
    ("cap", "words", "most"), [({"max_requests": 10}, "max_requests=10", 10), ({"max_cost": 1.0}, "max_cost=1", 5)]
)
def test_a_cap_ends_it_and_nothing_paid_is_lost(
    cap: dict[str, Any], words: str, most: int, stub: Callable[..., Stub], tmp_path: Path
) -> None:
    server = stub(trouble=False, slow=0.01)
    with pytest.raises(UserError, match=f"the cap online.scorer.{words} is reached"):
        list(judge(server, tmp_path, **cap).score(samples(40)))
    assert 5 <= sum(server.paid.values()) <= most, "those in flight are counted before their price is known"
    assert len(list(judge(server, tmp_path).score(samples(40)))) == 40
    assert sum(server.paid.values()) == 40


def test_a_cap_is_of_the_whole_run_whatever_attempts_and_processes_it_had(stub: Callable[..., Stub], tmp_path: Path) -> None:
    """An older version had a file for every process of a live loop."""
    server = stub(trouble=False)
    for rank, share in enumerate((samples(4), samples(10)[4:])):
        (tmp_path / "earlier").mkdir(exist_ok=True)
        list(judge(server, tmp_path / "earlier").score(share))
        (tmp_path / "earlier" / "judge.jsonl").rename(tmp_path / f"judge.{rank}.jsonl")
    assert sum(server.paid.values()) == 10
    again = judge(server, tmp_path, max_cost=2.3)
    assert (again.spent, again.num_requests) == (pytest.approx(10 * 0.2), 10)
    with pytest.raises(UserError, match=r"max_cost=2\.3 is reached, 2\.2000 dollars, and another answer may cost 0\.2000"):
        list(again.score(samples(20)))
    assert sum(server.paid.values()) == 11
    assert len(list(judge(server, tmp_path).score(samples(20)))) == 20
    assert sum(server.paid.values()) == 20


def test_a_cap_of_the_cost_is_refused_where_it_could_never_act(
    stub: Callable[..., Stub], tmp_path: Path, configure: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    server, capped = stub(trouble=False, usage=False), ["online.scorer.max_cost=5", "online.scorer.price_out=0"]
    words = ["loss=online", "online.loss=dpo", "online.scorer.name=judge", "online.scorer.model=j"]
    with pytest.raises(UserError, match=r"^online\.scorer\.max_cost=5 would never act, because both prices are 0: give online\."):
        configure(*words, *capped)
    assert configure(*words, *capped, "online.scorer.price_in=0.4").online is not None
    write_samples(tmp_path / "s.jsonl", 40)
    command = [str(tmp_path / "s.jsonl"), str(tmp_path / "f.jsonl"), "--judge", "j", "--url", server.url, "--max-cost", "5"]
    assert label(command) == 2
    assert "--max-cost=5 would never act, because both prices are 0: give --price-in and --price-out" in capsys.readouterr().err
    assert not server.seen
    assert label([*command, "--price-in", "0.4"]) == 2
    assert "max_cost=5 cannot act, because the server does not say how many tokens" in capsys.readouterr().err
    assert sum(server.paid.values()) == 1, "until a first answer has a price, one is in flight"


def test_a_server_that_is_down_or_refuses_is_reported(
    stub: Callable[..., Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "RETRIES", 1)  # each waits longer than the one before
    server = stub(fail=401)
    with pytest.raises(UserError, match=r"does not answer: AuthenticationError: .*Answers so far are kept"):
        list(judge(server, tmp_path).score(samples(2)))
    with pytest.raises(UserError, match="does not answer: APIConnectionError"):
        list(judge(server, tmp_path, url="http://127.0.0.1:9/v1").score(samples(2)))


def test_a_missing_key_and_a_rubric_without_a_placeholder_are_refused(
    stub: Callable[..., Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = stub()
    (tmp_path / "r.txt").write_text("Grade {prompt}!")
    with pytest.raises(UserError, match=r"has no placeholder \{completion\}"):
        judge(server, tmp_path, rubric=str(tmp_path / "r.txt"))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        judge(server, tmp_path)


KEY = "sk-not-a-key-0123456789abcdef"


@pytest.mark.parametrize("fail", [0, 401])
def test_a_key_that_the_server_quotes_is_written_to_no_file_and_not_shown(
    fail: int, stub: Callable[..., Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub(fail=fail, quote=f"Incorrect API key provided: {KEY}")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_samples(tmp_path / "samples.jsonl", 40)
    command = [str(tmp_path / "samples.jsonl"), str(tmp_path / "f.jsonl"), "--judge", "j", "--url", server.url]
    assert label(command) == (2 if fail else 0)
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] + [capsys.readouterr().err]
    assert "<OPENAI_API_KEY>" in "".join(texts)
    assert not any(KEY[:12] in text for text in texts)


def test_placeholders_inside_an_answer_are_not_filled(stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = stub(trouble=False)
    list(judge(server, tmp_path).score([replace(samples(1)[0], output="{prompt} {completion}")]))
    (text,) = server.seen
    assert "{prompt} {completion}" in text


READ = ['{"score": 7}', '```json\n{"score": 7.0}\n```', 'Sure: {"score": 7}', '{"criteria": {"score": 1}, "score": 7}',
        '{"score": 7, "details": [{"score": 2}]}', r'{"reason": "since \\frac{1}{2} is }{", "score": 7}',
        r'The {first} has \frac{1}{2}: {"score": 7, "of": {}}']  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_a_score_is_read(text: str) -> None:
    assert read_score(Answer(text, 0.0, "stop")).value == 7.0


NOT_READ = ["", "7", '{"score": ', '{"score": "7"}', '{"score": 11}', '{"score": true}', '{"score": 7} or {"score": 8}', "[7]",
            '{"score": {"score": 7}}', '{"details": {"score": 7}}', '{"criteria": {"score": 7}, "sco', "{'a': {\"score\": 7}}",
            '{"a": {}} {"score": 7}', '{"a":' * 9999]  # fmt: skip


@pytest.mark.parametrize("text", NOT_READ, ids=lambda text: text[:40])
def test_an_answer_without_a_valid_score_gives_none(text: str) -> None:
    assert read_score(Answer(text, 0.0, "stop")).value is None


def test_a_preference_is_read_and_nothing_else() -> None:
    said = ['{"better": "A"}', '{"better": "tie"}', '{"first": {"better": "B"}, "better": "A"}', '{"better": "a"}', "A",
            '{"better": ["A"]}']  # fmt: skip
    assert [read_preference(Answer(text, 0.0, "stop")) for text in said] == ["A", "tie", "A", None, None, None]


def test_a_judge_compares_in_an_order_that_is_drawn_and_recorded(stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = stub()
    write_samples(tmp_path / "samples.jsonl", 120)
    command = [str(tmp_path / "samples.jsonl"), str(tmp_path / "f.jsonl"), "--judge", "j", "--url", server.url, "--pairwise"]
    assert label(command) == 0
    rows, told = read(tmp_path / "f.jsonl"), read_meta(tmp_path / "f.jsonl")
    assert told["compared"] == 60 == len(rows) + told["ties"] + told["unparsable"]
    assert told["unparsable"] > 0
    shown_first = [row["sample_id_A"] for row in rows]
    assert 0 < sum(shown_first) < len(rows), "either sample is shown first now and then"
    for row in rows:
        assert row["label"] == int(row["verdict"] == "A")
        assert json.loads(row["said"].strip("`json\n"))["better"] == row["verdict"]
    paid = sum(server.paid.values())
    (tmp_path / "f.jsonl").unlink()
    assert label(command) == 0
    assert (read(tmp_path / "f.jsonl"), sum(server.paid.values())) == (rows, paid)


def test_pairs_of_which_nothing_could_be_learned_are_not_paid_for_and_refuse_no_training(
    stub: Callable[..., Stub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub()
    outputs = {
        "empty": ("", "yes"),
        "equal": ("yes", "yes"),
        "spaces": ("no", " \n"),
        **{f"q{n}": ("yes", "no") for n in range(20)},
    }
    prompts = [Prompt(name, ({"role": "user", "content": name},)) for name in outputs]
    write(tmp_path / "s.jsonl", [Sample(each, n, text).to_row() for each in prompts for n, text in enumerate(outputs[each.id])])
    words = [str(tmp_path / "s.jsonl"), str(tmp_path / "f.jsonl"), "--judge", "j", "--url", server.url, "--pairwise"]
    assert label(words) == 0
    rows, told = read(tmp_path / "f.jsonl"), read_meta(tmp_path / "f.jsonl")
    assert sum(server.paid.values()) == told["compared"] == 20
    assert told["not_compared"] == 3
    assert "3 pairs with an empty answer or equal ones not compared" in capsys.readouterr().err
    assert rows
    assert not {"empty", "equal", "spaces"} & {row["prompt_id"] for row in rows}


def test_each_answer_to_an_evaluation_prompt_is_compared_with_the_first_policys_of_its_number(
    stub: Callable[..., Stub], tmp_path: Path
) -> None:
    server = stub()
    prompts = [Prompt(f"p{n}", ({"role": "user", "content": f"question {n}"},), "eval") for n in range(6)]
    for name, count in (("samples", 3), ("first", 2)):
        write(tmp_path / f"{name}.jsonl", [Sample(each, n, f"{name} {n}").to_row() for each in prompts for n in range(count)])
    files = [str(tmp_path / name) for name in ("samples.jsonl", "f.jsonl")]
    words = ["--judge", "j", "--url", server.url, "--pairwise", "--against", str(tmp_path / "first.jsonl")]
    assert label([*files, *words, "--scores", str(tmp_path / "scores.jsonl")]) == 0
    rows, told = read(tmp_path / "scores.jsonl"), read_meta(tmp_path / "f.jsonl")
    assert len(rows) == told["compared"] == 12, "the third answers have no opponent"
    assert all(row["sample_id_A"] == row["sample_id_B"] for row in rows)
    won: dict[str, list[float]] = {}
    for row in rows:
        won.setdefault(row["prompt_id"], []).extend([] if row["won"] is None else [row["won"]])
    means = [sum(group) / len(group) for group in won.values() if group]
    assert told["win_rate"] == pytest.approx(sum(means) / len(means))
    assert told["win_rate/ci_low"] < told["win_rate"] < told["win_rate/ci_high"]
