"""A cached hash is that of the current file, or it is not cached."""

import os
from pathlib import Path

import pytest

from halos import hashes


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_cache", {})
    monkeypatch.setattr(hashes, "SETTLED", 0.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    return path


def kept(cache: Path) -> bool:
    return bool(hashes._cache) or (cache / "hashes").exists()


def test_a_file_that_may_still_change_within_its_times_is_not_cached(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED", 3600.0)
    assert hashes.file_hash(file, tmp_path) == hashes.digest(file)
    assert not kept(tmp_path)
    monkeypatch.setattr(hashes, "SETTLED", 0.0)
    assert hashes.file_hash(file, tmp_path) == hashes.digest(file)
    assert kept(tmp_path)


def test_a_file_whose_time_was_set_back_is_read_again(file: Path, tmp_path: Path) -> None:
    before, facts = hashes.file_hash(file, tmp_path), file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (facts.st_ino, facts.st_mtime_ns)
    assert hashes.file_hash(file, tmp_path) == hashes.digest(file) != before


def test_a_file_that_changes_while_it_is_read_is_not_cached(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashes.digest

    def changing(path: Path) -> str:
        found = digest(path)
        path.write_bytes(b"longer")
        return found

    monkeypatch.setattr(hashes, "digest", changing)
    hashes.file_hash(file, tmp_path)
    assert not kept(tmp_path)
