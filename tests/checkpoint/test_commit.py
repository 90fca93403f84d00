"""A checkpoint appears at once and whole, or not at all."""

import json
import os
from pathlib import Path

import pytest

from halos.checkpoint import commit, find, manifest


def save(final: Path, text: str = "weights") -> None:
    with commit.staged(final, main=True, barrier=lambda: None, facts={"step": 1}) as path:
        (path / "state").mkdir()
        (path / "state" / "file").write_text(text)


def test_a_commit_is_whole_and_leaves_nothing_hidden(tmp_path: Path) -> None:
    save(tmp_path / "step-00000001")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert manifest.verify(tmp_path / "step-00000001") == []


def fail_to_save(final: Path) -> None:
    with commit.staged(final, main=True, barrier=lambda: None, facts={}) as path:
        (path / "file").write_text("half")
        raise RuntimeError


def test_nothing_becomes_visible_when_a_save_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fail_to_save(tmp_path / "step-00000001")
    assert find.checkpoints(tmp_path) == []
    commit.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_save_of_a_step_replaces_the_first_and_never_mixes_with_it(tmp_path: Path) -> None:
    save(tmp_path / "step-00000001", "old")
    (tmp_path / "step-00000001" / "extra").write_text("of the old one")
    save(tmp_path / "step-00000001", "new")
    assert (tmp_path / "step-00000001" / "state" / "file").read_text() == "new"
    assert manifest.verify(tmp_path / "step-00000001") == []


def test_a_checkpoint_moved_aside_by_a_save_that_died_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "step-00000001", "old")
    (tmp_path / "step-00000001").rename(tmp_path / (commit.REPLACED + "step-00000001"))
    commit.sweep(tmp_path)
    assert find.newest(tmp_path).path == tmp_path / "step-00000001"


@pytest.mark.parametrize("fault", ["flip", "truncate", "delete", "add", "manifest"])
def test_every_kind_of_damage_is_found_and_the_one_before_taken(fault: str, tmp_path: Path) -> None:
    save(tmp_path / "step-00000001")
    save(tmp_path / "step-00000002")
    file = tmp_path / "step-00000002" / "state" / "file"
    if fault == "flip":
        file.write_text("weightz")
    elif fault == "truncate":
        os.truncate(file, 3)
    elif fault == "delete":
        file.unlink()
    elif fault == "add":
        file.with_name("stranger").write_text("")
    else:
        (tmp_path / "step-00000002" / manifest.NAME).write_text("{")
    found = find.newest(tmp_path)
    assert found.path == tmp_path / "step-00000001"
    assert len(found.passed_over) == 1
    assert "step-00000002 passed over" in found.passed_over[0]


def test_a_manifest_of_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    save(tmp_path / "step-00000001")
    path = tmp_path / "step-00000001" / manifest.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": manifest.FORMAT + 1}))
    assert "this version reads" in str(manifest.verify(tmp_path / "step-00000001")[0])
