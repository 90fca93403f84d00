"""A checkpoint appears at once and complete, or not at all."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from halos.checkpoint import commit, manifest, select


def save(final: Path, text: str = "weights") -> None:
    with commit.staged(final, main=True, facts={"step": 1}) as path:
        (path / "state").mkdir()
        (path / "state" / "file").write_text(text)


def test_a_commit_is_whole_and_leaves_nothing_hidden(tmp_path: Path) -> None:
    save(tmp_path / "step-00000001")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert manifest.verify(tmp_path / "step-00000001") == []


def test_who_may_read_a_save_may_read_its_weights(tmp_path: Path) -> None:
    with commit.staged(tmp_path / "step-00000001", main=True, facts={}) as path:
        save_file({"weight": torch.zeros(2)}, path / "model.safetensors")
    for path in (tmp_path / "step-00000001").iterdir():
        assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o666


def fail_to_save(final: Path) -> None:
    with commit.staged(final, main=True, facts={}) as path:
        (path / "file").write_text("half")
        raise RuntimeError


def test_nothing_becomes_visible_when_a_save_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fail_to_save(tmp_path / "step-00000001")
    assert select.checkpoints(tmp_path) == []
    commit.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_save_of_a_step_replaces_the_first_and_never_mixes_with_it(tmp_path: Path) -> None:
    save(tmp_path / "step-00000001", "old")
    (tmp_path / "step-00000001" / "extra").write_text("of the old one")
    save(tmp_path / "step-00000001", "new")
    assert (tmp_path / "step-00000001" / "state" / "file").read_text() == "new"
    assert manifest.verify(tmp_path / "step-00000001") == []


def test_what_is_exchanged_is_whole_readable_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: pytest.fail("nobody reads it after a power cut"))
    for text in ("first", "second"):
        with commit.exchanged(tmp_path / "served") as hidden:
            (hidden / "weights").write_text(text)
            (hidden / "weights").chmod(0o600)
        assert [(path.name, path.read_text()) for path in (tmp_path / "served").iterdir()] == [("weights", text)]
        assert (tmp_path / "served" / "weights").stat().st_mode & 0o777 == (tmp_path / "served").stat().st_mode & 0o666
    with pytest.raises(OSError, match="full"), commit.exchanged(tmp_path / "served") as hidden:
        raise OSError("full")
    assert (tmp_path / "served" / "weights").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_a_checkpoint_moved_aside_by_a_save_that_died_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "step-00000001", "old")
    (tmp_path / "step-00000001").rename(tmp_path / (commit.REPLACED + "step-00000001"))
    commit.remove_leftovers(tmp_path)
    assert select.newest(tmp_path).path == tmp_path / "step-00000001"


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
    selection = select.newest(tmp_path)
    assert selection.path == tmp_path / "step-00000001"
    assert len(selection.passed_over) == 1
    assert "step-00000002 passed over" in selection.passed_over[0]


def of_newer_format(checkpoint: Path) -> None:
    """Write the manifest of a later version."""
    path = checkpoint / manifest.NAME
    listed = {name: value for name, value in json.loads(path.read_text()).items() if name != "seal"}
    path.write_text(manifest.seal(json.dumps({**listed, "format": manifest.FORMAT + 1}, indent=1)))


def test_a_manifest_of_a_newer_format_is_refused_and_nothing_older_taken(tmp_path: Path) -> None:
    save(tmp_path / "step-00000001")
    save(tmp_path / "step-00000002")
    of_newer_format(tmp_path / "step-00000002")
    for refuses in (select.newest, select.refuse_newer):
        with pytest.raises(manifest.NewerFormatError, match=f"newer version.*format {manifest.FORMAT + 1}"):
            refuses(tmp_path)


def test_a_format_that_was_changed_by_a_flipped_bit_is_damage_and_not_a_newer_version(tmp_path: Path) -> None:
    save(tmp_path / "step-00000001")
    path = tmp_path / "step-00000001" / manifest.NAME
    path.write_text(path.read_text().replace(f'"format": {manifest.FORMAT}', f'"format": {manifest.FORMAT + 1}'))
    assert str(manifest.verify(tmp_path / "step-00000001")[0]) == "manifest.json: contents changed"


def test_every_flipped_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    save(tmp_path / "step-00000001")
    path = tmp_path / "step-00000001" / manifest.NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (1, 2, 32):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            assert manifest.verify(path.parent), f"byte {place}, bit {bit}"
    path.write_bytes(whole)
    assert manifest.verify(path.parent) == []


# --- several ranks -------------------------------------------------------------------------------------------------


def two(final: Path, *bodies: Callable[[Path], None]) -> list[BaseException | None]:
    """Save together as several ranks would, here threads; return what each of them raised."""
    turn, boxes = threading.Barrier(len(bodies)), [None] * len(bodies)
    raised: list[BaseException | None] = [None] * len(bodies)

    def process(rank: int) -> None:
        def gather(own: list[Any]) -> list[Any]:
            boxes[rank] = own[0]
            turn.wait(30)
            everyone = list(boxes)
            turn.wait(30)
            return everyone

        try:
            with commit.staged(final, main=rank == 0, gather=gather, facts={}) as path:
                bodies[rank](path)
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def writes(path: Path) -> None:
    (path / f"{threading.get_ident()}").write_text("weights")


def finds_no_room(path: Path) -> None:
    (path / "half").write_text("weig")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def finds_no_room_in_other_words(path: Path) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def fails(path: Path) -> None:
    raise ValueError("broken")


def test_all_processes_save_together(tmp_path: Path) -> None:
    assert two(tmp_path / "step-00000001", writes, writes) == [None, None]
    assert len(manifest.files_of(tmp_path / "step-00000001")) == 2


@pytest.mark.parametrize("full", [finds_no_room, finds_no_room_in_other_words])
@pytest.mark.parametrize("first", [True, False])
def test_all_learn_that_the_disk_of_one_is_full_and_nothing_is_left(full: Any, first: bool, tmp_path: Path) -> None:
    save(tmp_path / "step-00000001")
    raised = two(tmp_path / "step-00000002", *((full, writes) if first else (writes, full)))
    assert [type(error) for error in raised] == [commit.DiskFullError, commit.DiskFullError]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_another_error_is_raised_as_itself_and_told_to_the_others(tmp_path: Path) -> None:
    mine, others = two(tmp_path / "step-00000002", fails, finds_no_room)
    assert isinstance(mine, ValueError)
    assert isinstance(others, OSError)
    mine, others = two(tmp_path / "step-00000002", writes, fails)
    assert isinstance(mine, commit.SaveError)
    assert "broken" in str(mine)
    assert isinstance(others, ValueError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("call", "number"), [("fsync", 1), ("rename", 1), ("rename", 2), ("mkdir", 1)])
def test_a_disk_that_fills_at_the_commit_itself_leaves_the_older_one(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail at the first call, or at the second: the rename after the older checkpoint is moved aside."""
    real, calls = vars(os)[call], iter(range(1, 100))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    save(tmp_path / "step-00000001", "old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(commit.DiskFullError):
        save(tmp_path / "step-00000001", "new")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert (tmp_path / "step-00000001" / "state" / "file").read_text() == "old"


# --- leftovers of interrupted saves ---------------------------------------------------------------------------------------------


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    leftovers = [".config.yaml.123", ".result.json.4", ".metrics.jsonl.77", "attempts/.000.yaml.9"]
    others = ["config.yaml", "attempts/000.yaml", ".run.lock.12-a3", ".hidden", "notes.1"]
    for name in (*leftovers, *others):
        (tmp_path / name).write_text("")
    (tmp_path / (commit.HIDDEN + "FINAL")).mkdir()
    commit.remove_leftovers(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(others)
    assert not (tmp_path / (commit.HIDDEN + "FINAL")).exists()
