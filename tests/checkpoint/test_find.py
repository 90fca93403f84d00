"""Which checkpoint a run goes on from, by what is there and what is on record of it."""

from pathlib import Path

import pytest

from halos.checkpoint import find, good, manifest
from halos.errors import UserError
from halos.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """With the checkpoints of steps 2 and 4."""
    directory = RunDir(tmp_path)
    for step in (2, 4):
        path = directory.checkpoints / find.name_of(step)
        path.mkdir(parents=True)
        (path / "weights").write_text(str(step))
        (path / manifest.NAME).write_text(manifest.describe(path, {"step": step}))
        find.record(directory, path)
    return directory


def test_where_every_checkpoint_is_doubted_a_run_goes_on_from_its_beginning(run: RunDir) -> None:
    two, four = run.saves().values()
    assert find.look(run, None) == find.Found(four, [])
    good.write(run, good.Good(2, doubted_at=6))
    assert find.look(run, None).path == two
    assert find.look(run, four).path == four, "which was asked for by name"
    good.write(run, good.Good(-1, doubted_at=6))
    found = find.look(run, None)
    assert (found.path, [line.partition(":")[0] for line in found.passed_over]) == (
        None,
        ["step-00000004 passed over", "step-00000002 passed over"],
    )


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(run: RunDir) -> None:
    for path in run.saves().values():
        (path / "weights").write_text("x")
    with pytest.raises(
        UserError, match=r"up to step 4, and none of them is whole \(step-00000004 passed over: weights: contents"
    ):
        find.look(run, None)
    for path in run.saves().values():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with pytest.raises(UserError, match=r"up to step 4, and none of them is whole: .* holds none"):
        find.look(run, None)
    run.commits.path.unlink()
    assert find.look(run, None) == find.Found(None, []), "a run that never committed one"
