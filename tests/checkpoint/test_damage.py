"""Any damage to a checkpoint is detected before a resume, which then uses the checkpoint before it."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from save_scenarios import LAST, TrainedRun

import train
from halos.checkpoint import commit, manifest, select, state
from halos.errors import UserError
from halos.rundir import RunDir

Fault = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> TrainedRun:
    return TrainedRun("lora", tmp_path_factory.mktemp("damage"), cache)


def a_file(directory: Path, chance: random.Random, least: int = 1) -> Path:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.stat().st_size >= least]
    return chance.choice(files)


def flip(directory: Path, chance: random.Random) -> None:
    path = a_file(directory, chance)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def zero_a_block(directory: Path, chance: random.Random) -> None:
    path = a_file(directory, chance)
    content = path.read_bytes()
    at = chance.randrange(len(content))
    changed = content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :]
    path.write_bytes(changed if changed != content else changed + b"\0")


def truncate(directory: Path, chance: random.Random) -> None:
    path = a_file(directory, chance)
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def extend(directory: Path, chance: random.Random) -> None:
    with a_file(directory, chance, 0).open("ab") as file:
        file.write(chance.randbytes(chance.randint(1, 4096)))


def delete(directory: Path, chance: random.Random) -> None:
    a_file(directory, chance, 0).unlink()


def delete_a_directory(directory: Path, chance: random.Random) -> None:
    shutil.rmtree(chance.choice([path for path in sorted(directory.rglob("*")) if path.is_dir()]))


def add(directory: Path, chance: random.Random) -> None:
    a_file(directory, chance, 0).with_name(f"stranger-{chance.random()}").write_bytes(b"")


def rename(directory: Path, chance: random.Random) -> None:
    path = a_file(directory, chance, 0)
    path.rename(path.with_name(path.name + "-moved"))


def become_a_directory(directory: Path, chance: random.Random) -> None:
    path = a_file(directory, chance, 0)
    path.unlink()
    path.mkdir()


def come_from_the_one_before(directory: Path, chance: random.Random) -> None:
    """A valid checkpoint of another step."""
    before = directory.with_name(select.name_of(LAST - 1))
    files = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    differing = [
        path for path in files if path.name != manifest.NAME and (directory / path).read_bytes() != (before / path).read_bytes()
    ]
    path = chance.choice(differing)
    shutil.copy(before / path, directory / path)


FAULTS: list[Fault] = [flip, flip, zero_a_block, truncate, extend, delete, delete_a_directory, add, rename, become_a_directory,
                       come_from_the_one_before]  # fmt: skip


def damage(trained: TrainedRun, seeds: range) -> None:
    run_dir = trained.directory / "damaged"
    for seed in seeds:
        chance = random.Random(seed)
        shutil.rmtree(run_dir, ignore_errors=True)
        for step in (LAST - 1, LAST):
            shutil.copytree(trained.checkpoint(step), run_dir / "checkpoints" / select.name_of(step))
        fault = chance.choice(FAULTS)
        fault(run_dir / "checkpoints" / select.name_of(LAST), chance)
        selection = select.select_checkpoint(RunDir(run_dir), None)
        assert selection.path == run_dir / "checkpoints" / select.name_of(LAST - 1), (
            f"seed {seed}: {fault.__name__} was not detected"
        )
        assert len(selection.passed_over) == 1
        assert selection.passed_over[0].startswith(f"{select.name_of(LAST)} passed over: ")


def test_a_hundred_kinds_of_damage_are_found_and_the_one_before_is_taken(trained: TrainedRun) -> None:
    damage(trained, range(100))


@pytest.mark.slow
def test_a_thousand_kinds_of_damage_are_found_and_the_one_before_is_taken(trained: TrainedRun) -> None:
    damage(trained, range(100, 1100))


def test_a_checkpoint_of_a_newer_version_stops_a_resume_and_nothing_is_touched(trained: TrainedRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained.templates, run_dir)
    path = run_dir / "checkpoints" / select.name_of(LAST) / manifest.NAME
    text = path.read_text().replace(f'"format": {manifest.FORMAT}', f'"format": {manifest.FORMAT + 1}')
    path.write_text(manifest.seal(text.rpartition(manifest.SEAL)[0] + "\n}"))
    (run_dir / "checkpoints" / (commit.HIDDEN + "step-00000009")).mkdir()
    (run_dir / "result.json").write_text('{"status": "running", "step": 4, "metrics": {}}')

    def everything() -> dict[str, bytes | None]:
        return {str(path): path.read_bytes() if path.is_file() else None for path in run_dir.rglob("*")}

    before = everything()
    with pytest.raises(UserError, match=f"newer version of halos.*format {manifest.FORMAT + 1}"):
        train.start([f"resume={run_dir}"])
    assert everything() == before


STRAY = [".DS_Store", "._model.safetensors", ".nfs0000000000b0d9b100000002", "Thumbs.db", ".file.swp"]


def test_what_a_desktop_or_a_file_server_leaves_is_no_damage(trained: TrainedRun, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / select.name_of(LAST)
    shutil.copytree(trained.checkpoint(LAST), checkpoint)
    for place in [checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir())]:
        for name in STRAY:
            (place / name).write_bytes(b"\0\5\26\7")
    selection = select.select_checkpoint(RunDir(tmp_path / "run"), None)
    assert (selection.path, selection.passed_over) == (checkpoint, [])
    listed = json.loads(manifest.describe(checkpoint, {}))["files"]
    assert {Path(name).name for name in listed} & set(STRAY) == {".file.swp"}, "and what there is of them is not listed"
    run = trained.trainer.run
    state.load_optimizer(
        checkpoint / "state", run.strategy, run.module, run.optimizer
    )  # torch would read ._model.safetensors too


@pytest.mark.parametrize("left", ["damaged", "deleted"])
def test_a_run_whose_checkpoints_are_all_lost_does_not_begin_again_by_itself(
    left: str, trained: TrainedRun, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for step in (LAST - 1, LAST):
        place = run_dir / "checkpoints" / select.name_of(step)
        shutil.copytree(trained.checkpoint(step), place)
        select.record_commit(RunDir(run_dir), place)
        flip(place, random.Random(step)) if left == "damaged" else shutil.rmtree(place)
    with pytest.raises(UserError, match=f"up to step {LAST}, and none of them is whole.*delete {run_dir}"):
        select.select_checkpoint(RunDir(run_dir), None)


def test_a_run_that_never_saved_a_checkpoint_begins_at_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / (commit.HIDDEN + select.name_of(2))).mkdir(parents=True)
    assert select.select_checkpoint(RunDir(tmp_path / "run"), None) == select.Selection(None, [])


def test_a_checkpoint_is_on_record_when_it_has_become_durable(trained: TrainedRun) -> None:
    entries = RunDir(trained.templates).commits.read()
    assert ([row["step"] for row in entries.rows], entries.fault) == ([*range(1, LAST + 1)], None)
