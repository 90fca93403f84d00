"""Selection of the checkpoint to resume from, by the files and the record of commits."""

import json
from pathlib import Path

import pytest

from halos.checkpoint import known_good, manifest, select
from halos.errors import UserError
from halos.rundir import RunDir


def test_where_every_checkpoint_is_doubted_a_run_goes_on_from_its_beginning(saved_twice: RunDir) -> None:
    two, four = saved_twice.checkpoints_by_step().values()
    assert select.preview_selection(saved_twice, None) == select.Selection(four, [])
    known_good.write(saved_twice, known_good.KnownGood(2, doubted_at=6))
    assert select.preview_selection(saved_twice, None).path == two
    assert select.preview_selection(saved_twice, four).path == four, "which was asked for by name"
    known_good.write(saved_twice, known_good.KnownGood(-1, doubted_at=6))
    selection = select.preview_selection(saved_twice, None)
    assert (selection.path, [line.partition(":")[0] for line in selection.passed_over]) == (
        None,
        ["step-00000004 passed over", "step-00000002 passed over"],
    )


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(saved_twice: RunDir) -> None:
    for path in saved_twice.checkpoints_by_step().values():
        (path / "weights").write_text("x")
    with pytest.raises(
        UserError, match=r"up to step 4, and none of them is whole \(step-00000004 passed over: weights: contents"
    ):
        select.preview_selection(saved_twice, None)
    for path in saved_twice.checkpoints_by_step().values():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with pytest.raises(UserError, match=r"up to step 4, and none of them is whole: .* holds none"):
        select.preview_selection(saved_twice, None)
    saved_twice.commits.path.unlink()
    assert select.preview_selection(saved_twice, None) == select.Selection(None, []), "a run that never committed one"


def test_what_is_noted_of_a_save_has_no_key_twice(saved_twice: RunDir) -> None:
    lines = saved_twice.commits.path.read_text().splitlines()
    for line in lines:
        keys = [key for key, _ in json.loads(line, object_pairs_hook=list)]
        assert len(keys) == len(set(keys)), line
    assert len(lines) == 2


def replaced(path: Path) -> None:
    """By one that is whole, and other."""
    (path / "weights").write_text("of a run of the same name")
    (path / manifest.NAME).write_text(manifest.describe(path, {"step": select.step_of(path)}))
    assert not manifest.verify(path)


def test_a_checkpoint_in_the_place_of_the_one_that_was_saved_is_refused_though_it_is_whole(saved_twice: RunDir) -> None:
    for path in saved_twice.checkpoints_by_step().values():
        before = {file: file.read_bytes() for file in path.iterdir()}
        replaced(path)
        for choose in (select.preview_selection, select.select_checkpoint):
            with pytest.raises(UserError, match=f"{path} is not what this run saved there: it is sealed .*, and what was saved"):
                choose(saved_twice, None)
        for file, content in before.items():
            file.write_bytes(content)
    assert select.preview_selection(saved_twice, None).path == path


def test_a_step_that_was_saved_anew_after_going_back_is_taken_though_a_kill_kept_it_from_being_noted(saved_twice: RunDir) -> None:
    two, four = saved_twice.checkpoints_by_step().values()
    select.record_commit(saved_twice, two)  # as a run that goes on from there does first
    replaced(four)
    assert select.preview_selection(saved_twice, None).path == four
    select.record_commit(saved_twice, four)
    replaced(two)
    with pytest.raises(UserError, match=f"{two} is not what this run saved there"):
        select.preview_selection(saved_twice, None)


def test_notes_that_no_run_has_written_say_nothing_whoever_sealed_them(saved_twice: RunDir) -> None:
    four = saved_twice.checkpoints_by_step()[4]
    for row in ({"step": "4", "checkpoint": four.name, "manifest_seal": "0"}, {"checkpoint": four.name}, {"step": None}):
        saved_twice.commits.add(row)
    assert select.preview_selection(saved_twice, None).path == four
