"""Large sources are tokenised in shards, by several processes: the result is that of one, and what is done is kept."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from halos.data import prepare, shards
from halos.data.dataset import Counts, Dataset
from halos.data.row_tokeniser import RowTokeniser
from halos.data.sources import Source, open_source
from halos.data.tokenize import Encoder, vocabulary_of
from halos.errors import UserError
from halos.examples import Item
from halos.types import Comparison, Demonstration, Scored

from .tokenizers import jsonl, prepared, tokenizer

WORDS = ["one", "two", "three", "four", "five"]


def pairs(count: int) -> list[dict[str, Any]]:
    """Some are equal, and dropped; prompts repeat."""
    return [
        {"prompt": f"What is {WORDS[n % 3]}?", "chosen": WORDS[n % 5], "rejected": f"{WORDS[n * 7 % 4]}"} for n in range(count)
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Shards of 10 rows, made by so many processes."""

    def set_to(processes: int) -> None:
        monkeypatch.setattr(shards, "SHARD", 10)
        monkeypatch.setattr(shards, "processes", lambda: processes)

    return set_to


def whole(data: Dataset) -> tuple[Any, ...]:
    items = [(item.id, item.prompt.tolist(), [each.ids.tolist() for each in item.completions]) for item in data]
    return data.content, data.report, data.groups.tolist(), data.sources.tolist(), items


def test_shards_of_several_processes_give_what_one_process_gives(tmp_path: Path, small: Callable[[int], None]) -> None:
    paths = [jsonl(tmp_path / "a.jsonl", pairs(45)), jsonl(tmp_path / "b.jsonl", pairs(7))]
    plain = whole(prepared(paths, tmp_path / "plain", kind=Comparison))
    for processes in (1, 2):
        small(processes)
        assert whole(prepared(paths, tmp_path / str(processes), kind=Comparison)) == plain
        source = max((tmp_path / str(processes) / "shards").iterdir(), key=lambda path: len(list(path.iterdir())))  # the long one
        assert sorted(each.name for each in source.iterdir()) == [
                *(f"{number:06d}" for number in range(5)), "about.json", "shards.json"
            ]  # fmt: skip


def test_another_mixture_or_place_tokenises_only_what_is_new(
    tmp_path: Path, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    small(1)
    path, read = jsonl(tmp_path / "a.jsonl", pairs(25)), list[int]()
    batches = RowTokeniser.batches

    def counted(self: RowTokeniser, rows: Any, counts: Any) -> Iterator[Any]:
        rows = list(rows)
        read.append(len(rows))
        return batches(self, rows, counts)

    monkeypatch.setattr(RowTokeniser, "batches", counted)
    first = prepared(path, tmp_path, kind=Comparison)
    assert read == [10, 10, 5]
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "a.jsonl"
    Path(path).rename(moved)
    more = jsonl(tmp_path / "b.jsonl", pairs(12))
    data = prepared([more, {"path": str(moved), "weight": 0.5}], tmp_path, kind=Comparison)
    assert read == [10, 10, 5, 10, 2]
    assert [item.id for item in data][-1] == f"{moved}:25#0"
    assert data.report[1].places["with equal completions"][0].startswith(f"{moved}:")
    assert [item.prompt.tolist() for item in data][-len(first) :] == [item.prompt.tolist() for item in first]
    prepared({"path": str(moved), "filter": "prompt != 'What is one?'"}, tmp_path, kind=Comparison)
    assert sum(read) > 25 + 12, "a filter gives other rows"


def test_a_damaged_part_alone_is_made_again(
    tmp_path: Path, small: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    small(1)
    path = jsonl(tmp_path / "a.jsonl", pairs(35))
    before = whole(prepared(path, tmp_path, kind=Comparison))
    (source,) = (tmp_path / "shards").iterdir()
    rows = source / "000002" / "rows.arrow"
    kept = {each: each.stat().st_mtime_ns for each in source.glob("*/rows.arrow")}
    content = rows.read_bytes()
    rows.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    for composed in (tmp_path / "data").iterdir():
        (composed / "rows.arrow").unlink()
    assert whole(prepared(path, tmp_path, kind=Comparison)) == before
    assert rows.read_bytes() == content
    assert {each for each, when in kept.items() if each.stat().st_mtime_ns != when} == {rows}
    assert "000002 is damaged: it is written again" in caplog.text


@pytest.mark.parametrize("processes", [1, 2])
def test_a_wrong_row_is_named_and_the_parts_before_it_are_kept(
    processes: int, tmp_path: Path, small: Callable[[int], None]
) -> None:
    small(processes)
    rows = pairs(40)
    del rows[24]["rejected"], rows[24]["prompt"]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a\.jsonl:25: columns found: chosen"):
        prepared(path, tmp_path, kind=Comparison)
    (source,) = (tmp_path / "shards").iterdir()
    names = {each.name for each in source.iterdir()}
    assert {"000000", "000001"} <= names
    assert not {"000002", "shards.json"} & names
    assert not list((tmp_path / "data").iterdir())


def test_rows_before_a_line_that_cannot_be_read_are_kept(tmp_path: Path, small: Callable[[int], None]) -> None:
    small(1)
    path = Path(jsonl(tmp_path / "a.jsonl", pairs(25)))
    path.write_text(path.read_text() + "{")
    with pytest.raises(UserError, match=r"a\.jsonl:26: not valid JSON"):
        prepared(str(path), tmp_path, kind=Comparison)
    assert len(list((tmp_path / "shards").glob("*/0*"))) == 3


def test_what_cannot_be_sent_to_another_process_is_tokenised_in_this_one(
    tmp_path: Path, small: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    small(2)
    caplog.set_level("INFO")
    path = jsonl(tmp_path / "a.jsonl", pairs(25))
    plain = prepared(path, tmp_path, kind=Comparison, transform=lambda example: example, transform_key="a function of its own")
    assert len(plain) == len(prepared(path, tmp_path / "other", kind=Comparison))
    assert "one process tokenises: " in caplog.text


KILLED = """
import sys
from pathlib import Path
from halos.data import shards
from halos.types import Comparison
from tests.data.tokenizers import prepared
shards.SHARD, shards.processes = 10, lambda: 2
prepared(sys.argv[1], Path(sys.argv[2]), kind=Comparison)
"""


def test_a_second_start_goes_on_where_a_killed_one_stopped_and_no_process_is_left(
    tmp_path: Path, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl", pairs(500))
    run = subprocess.Popen([sys.executable, "-c", KILLED, path, str(tmp_path)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while len(done := list((tmp_path / "shards").glob("*/0*"))) < 5:
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.01)
    children = _children(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert len(children) == 2
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not list((tmp_path / "shards").glob("*/shards.json"))
    kept = {each: each.stat().st_mtime_ns for each in done}
    small(1)
    data = prepared(path, tmp_path, kind=Comparison)
    assert {each: each.stat().st_mtime_ns for each in done} == kept
    monkeypatch.setattr(shards, "SHARD", 10_000)
    assert whole(data) == whole(prepared(path, tmp_path / "other", kind=Comparison))


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def test_rows_of_a_shard_may_all_be_dropped(tmp_path: Path, small: Callable[[int], None]) -> None:
    small(1)
    equal = [{"prompt": "What is one?", "chosen": "one", "rejected": "one"}] * 12
    data = prepared(jsonl(tmp_path / "a.jsonl", [*equal, *pairs(12)]), tmp_path, kind=Comparison)
    assert (data.report[0].rows, len(data)) == (24, data.report[0].kept)
    with pytest.raises(UserError, match=r"12 rows, 0 examples kept; dropped 12 \(12 with equal completions\): none of them"):
        prepared(jsonl(tmp_path / "b.jsonl", equal), tmp_path, kind=Comparison)


def test_the_list_of_parts_is_no_promise(tmp_path: Path, small: Callable[[int], None]) -> None:
    """A shard that is gone is made again."""
    small(1)
    path = jsonl(tmp_path / "a.jsonl", pairs(25))
    before = whole(prepared(path, tmp_path, kind=Comparison))
    (source,) = (tmp_path / "shards").iterdir()
    (source / "000001" / "meta.json").unlink()
    for composed in (tmp_path / "data").iterdir():
        (composed / "meta.json").unlink()
    assert whole(prepared(path, tmp_path, kind=Comparison)) == before
    assert prepare.is_whole(source / "000001")
    listed = json.loads((source / "shards.json").read_text())
    (source / "shards.json").write_text(json.dumps({**listed, "shards": 2}))  # a third of the rows would be gone
    for composed in (tmp_path / "data").iterdir():
        (composed / "meta.json").unlink()
    assert whole(prepared(path, tmp_path, kind=Comparison)) == before


def test_a_shard_that_another_run_made_meanwhile_is_kept(
    tmp_path: Path, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two mixtures may tokenise one source at the same time."""
    small(1)
    path, write = jsonl(tmp_path / "a.jsonl", pairs(25)), shards.write_shard

    def overtaken(directory: Path, *rest: Any) -> None:
        write(directory, *rest)
        write(directory.parent / directory.name[1:7], *rest)  # the other run is the first

    monkeypatch.setattr(shards, "write_shard", overtaken)
    data = prepared(path, tmp_path, kind=Comparison)
    monkeypatch.undo()
    assert whole(data) == whole(prepared(path, tmp_path / "other", kind=Comparison))
    assert not list((tmp_path / "shards").glob("*/.*"))


def test_a_shard_that_another_run_publishes_while_it_is_looked_for_is_not_taken_for_a_damaged_one(
    tmp_path: Path, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small(1)
    path, looks, is_whole = jsonl(tmp_path / "a.jsonl", pairs(25)), Counter[str](), shards.is_whole
    prepared(path, tmp_path / "other", kind=Comparison)

    def overtaken(shard: Path, cache: Path | None = None) -> bool:
        found, other = is_whole(shard, cache), next((tmp_path / "other" / "shards").glob(f"*/{shard.name}"))
        looks[shard.name] += 1
        if looks[shard.name] == 2 and not found:
            shutil.copytree(other, shard)
        return found

    monkeypatch.setattr(shards, "is_whole", overtaken)
    data = prepared(path, tmp_path, kind=Comparison)
    assert len(data)
    assert looks
    assert "damaged" not in caplog.text


def talk(dice: random.Random) -> dict[str, Any]:
    """A conversation or a pair of any length, some of which are too long in each way."""
    said = [" ".join(dice.choices(WORDS, k=dice.choice([1, 3, 30]))) for _ in range(9)]
    turns = [{"role": role, "content": said[n]} for n, role in enumerate(["user", "assistant"] * dice.choice([1, 2, 4]))]
    if dice.random() < 0.3:
        turns.insert(0, {"role": "system", "content": said[8]})
    if dice.random() < 0.5:
        return {"messages": turns}
    return {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [{"role": "assistant", "content": said[7]}]}


@pytest.mark.parametrize("truncation", ["drop", "truncate"])
def test_another_max_length_tokenises_nothing_and_gives_what_tokenising_within_it_gives(
    truncation: str, tmp_path: Path, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against the encoder, which shortens examples while it has their text."""
    small(1)
    dice, made = random.Random(0), tokenizer()
    sampled = {"prompt": "What is one?", "output": "one two", "reward": 1.0, "type": "scalar_feedback"}
    path = jsonl(tmp_path / "a.jsonl", [*(talk(dice) for _ in range(60)), sampled, {**sampled, "output": "one " * 60}])
    settings: dict[str, Any] = {"kind": Demonstration, "score": "all", "tokenizer": made}
    prepared(path, tmp_path / "cache", max_length=10**6, **settings)
    tokenised, encode, calls = {each: each.stat().st_mtime_ns for each in tmp_path.rglob("shards/*/0*/*")}, Encoder.encode, []
    monkeypatch.setattr(Encoder, "encode", lambda self, examples: calls.append(len(examples)) or encode(self, examples))
    for longest in (40, 90, 200):
        calls.clear()
        data = prepared(path, tmp_path / "cache", max_length=longest, truncation=truncation, **settings)
        assert sum(calls) < (60 if truncation == "truncate" else 1), "those alone that lose turns are rendered again"
        direct = RowTokeniser(made, kind=Demonstration, score="all", max_length=longest, truncation=truncation)
        counts, expected = Counts(path), []
        for _, outcomes in direct.batches(open_source(Source.of(path), Demonstration, "train").rows(), counts):
            for where, _, result in outcomes:
                if isinstance(result, str):
                    counts.drop(result, where)
                else:
                    result[1].count(where, counts)
                    expected.append(result[0])
        assert data.report == (counts,)
        assert [whole_item(each) for each in data] == [whole_item(each) for each in expected]
        assert 0 < counts.kept <= 62
        assert counts.cut_turns > 0 or truncation == "drop"
        assert counts.cut_completions > 0 or truncation == "drop" or longest == 200
    assert {each: each.stat().st_mtime_ns for each in tmp_path.rglob("shards/*/0*/*")} == tokenised
    with pytest.raises(UserError, match=r"a\.jsonl:\d+: \d+ tokens, and train.max_length is 40; raise it"):
        prepared(path, tmp_path / "cache", max_length=40, truncation="error", **settings)


def whole_item(item: Item) -> tuple[Any, ...]:
    return item.id, item.prompt.tolist(), [(each.ids.tolist(), each.scored.tolist()) for each in item.completions], item.labels


def test_samples_are_cut_with_their_log_probs_and_masked_ones_stay_unscored(tmp_path: Path) -> None:
    made, ids = tokenizer(), list(range(20, 40))
    sample = {"type": "scalar_feedback", "prompt": "Hi", "output": "one", "reward": 1.0, "output_ids": ids, "logps": [-0.5] * 20,
              "vocabulary": vocabulary_of(made)}  # fmt: skip
    path = jsonl(tmp_path / "a.jsonl", [sample, {**sample, "masked": True}, {**sample, "prompt": "Hi " * 200}])
    long = prepared(path, tmp_path, kind=Scored, max_length=1000, tokenizer=made)
    prompt = len(long[0].prompt)
    data = prepared(path, tmp_path, kind=Scored, max_length=prompt + 7, truncation="truncate", tokenizer=made)
    assert [each.completions[0].ids.tolist() for each in data] == [ids[:7]] * 2
    assert [each.completions[0].scored.sum() for each in data] == [7, 0]
    assert data[0].logps is not None
    assert len(data[0].logps) == 7
    assert data[1].logps is None
    assert data.report[0].dropped == {"with a prompt that fills max_length": 1}
    assert data.report[0].cut_completions == 2
