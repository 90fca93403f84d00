"""Large sources are tokenised in shards, by several processes: the result is that of one, and what is done is kept."""

import json
import os
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
from halos.data.dataset import Dataset
from halos.data.row_tokeniser import RowTokeniser
from halos.errors import UserError
from halos.types import Comparison

from .tokenizers import jsonl, prepared

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
        (source,) = (tmp_path / str(processes) / "shards").iterdir()  # of the long one
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
