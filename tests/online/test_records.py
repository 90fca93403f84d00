"""Files between stages: complete or absent, and resumable."""

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from halos.errors import UserError
from halos.online.records import ResumableFile, meta_path, open_on_all_ranks, read, read_meta, write

REQUEST = {"model": "a", "seed": 0}


def test_rows_survive_and_the_file_has_them_in_the_requested_order(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    first = ResumableFile(path, REQUEST)
    first.open()
    first.add({("p", 1): {"n": 1}})
    again = ResumableFile(path, REQUEST)
    again.open()
    assert again.rows == {("p", 1): {"n": 1}}
    again.add({("p", 0): {"n": 0}})
    assert not again.is_done()
    again.finish([("p", 0), ("p", 1)], {"samples": 2})
    assert read(path) == [{"n": 0}, {"n": 1}]
    assert read_meta(path) == {"request": REQUEST, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "samples": 2}
    assert ResumableFile(path, REQUEST).is_done()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["samples.jsonl", "samples.meta.json"]


def test_a_line_that_a_crash_cut_off_is_dropped_and_the_next_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    ledger = ResumableFile(path, REQUEST)
    ledger.open()
    ledger.add({"a": {"n": 1}})
    with (ledger.partial / "rows.0.jsonl").open("a") as file:
        file.write('{"key": "b", "row": {"n"')
    again = ResumableFile(path, REQUEST)
    again.open()
    again.add({"c": {"n": 3}})
    last = ResumableFile(path, REQUEST)
    last.open()
    assert last.rows == {"a": {"n": 1}, "c": {"n": 3}}


def test_rows_of_other_ranks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for rank in (0, 1, 2):
        ledger = ResumableFile(path, REQUEST, rank=rank)
        ledger.open()
        ledger.add({f"{rank}": {"rank": rank}})
    alone = ResumableFile(path, REQUEST)
    alone.open()
    assert alone.rows.keys() == {"0", "1", "2"}


def test_another_request_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    ledger = ResumableFile(path, REQUEST)
    ledger.open()
    ledger.add({"a": {"n": 1}})
    with pytest.raises(UserError, match="its seed was 0, not 1: delete it"):
        ResumableFile(path, {**REQUEST, "seed": 1}).open()
    ledger.finish(["a"], {})
    with pytest.raises(UserError, match="its model was a, not b"):
        ResumableFile(path, {**REQUEST, "model": "b"}).is_done()
    meta_path(path).unlink()
    with pytest.raises(UserError, match="does not say what it was made from"):
        ResumableFile(path, REQUEST).is_done()


def test_no_rank_adds_rows_before_all_have_read_which_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting, whole = threading.Barrier(2, timeout=10), ResumableFile.open

    def slow_on_rank_1(file: ResumableFile) -> None:
        time.sleep(0.2 * file.rank)
        whole(file)

    def start(rank: int) -> ResumableFile:
        file = ResumableFile(tmp_path / "x.jsonl", REQUEST, rank=rank)
        open_on_all_ranks(file, SimpleNamespace(main=rank == 0, barrier=meeting.wait))  # type: ignore[arg-type]
        if rank == 0:
            file.add({"a": {"n": 1}})
        return file

    monkeypatch.setattr(ResumableFile, "open", slow_on_rank_1)
    with ThreadPoolExecutor(2) as ranks:
        _, second = ranks.map(start, range(2))
    assert second.rows == {}


def test_what_an_older_version_did_not_record_is_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    ResumableFile(path, REQUEST).open()
    again = ResumableFile(path, {**REQUEST, "code": "c"}, recorded_since=("code",))
    again.open()
    again.add({"a": {"n": 1}})
    with pytest.raises(UserError, match="its seed was 0, not 1"):
        ResumableFile(path, {"code": "c", **REQUEST, "seed": 1}, recorded_since=("code",)).open()
    again.finish(["a"], {})
    with pytest.raises(UserError, match="its code was c, not d"):
        ResumableFile(path, {**REQUEST, "code": "d"}, recorded_since=("code",)).is_done()


def test_both_kinds_of_file_are_read_and_anything_else_is_refused_by_name(tmp_path: Path) -> None:
    rows = [{"a": "ä"}, {"a": 2}]
    for name in ("x.json", "x.jsonl"):
        write(tmp_path / name, rows)
        assert read(tmp_path / name) == rows
    assert isinstance(json.loads((tmp_path / "x.json").read_text()), list)
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(UserError, match=r"bad.jsonl:2 cannot be read as JSON"):
        read(tmp_path / "bad.jsonl")
