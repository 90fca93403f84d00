"""After a power cut at any moment of a save, nothing half-written counts as a checkpoint, and the one before it is selected."""

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fs_recorder import Change, recording
from save_scenarios import LAST, SCENARIOS, Scenario, TrainedRun, save, save_final
from simulated_disk import SimulatedDisk

from halos.checkpoint import commit, select


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> TrainedRun:
    return TrainedRun(request.param, tmp_path_factory.mktemp(request.param), cache)


def recorded(run_dir: Path, act: Callable[[], object]) -> list[Change]:
    """Return every change that `act` makes to the run's directory, in order. A forked child makes them, not the trainer here."""
    log = run_dir.with_suffix(".changes")
    pid = os.fork()
    if not pid:
        try:
            changes: list[Change] = []
            with recording(run_dir, lambda change, half: changes.append(change)):
                act()
            log.write_bytes(pickle.dumps(changes))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return pickle.loads(log.read_bytes())


def cut_power(trained: TrainedRun, scenario: Scenario, number: int) -> None:
    """At so many moments, the last of them when the scenario is over and what it did must be there to stay."""
    run_dir, place = trained.directory / "recorded", trained.directory / "cut"
    shutil.rmtree(run_dir, ignore_errors=True)
    trained.prepare_directory(scenario, run_dir)
    disk = SimulatedDisk(run_dir)
    changes, chance = recorded(run_dir, lambda: trained.run_scenario(scenario, run_dir)), random.Random(scenario.name)
    assert {change.kind for change in changes} >= {"open", "write", "fsync", "rename"}
    moments = [*sorted(chance.choices(range(len(changes)), k=number - 1)), len(changes)]
    played = 0
    for moment in moments:
        disk.apply(changes[played:moment])
        played = moment
        shutil.rmtree(place, ignore_errors=True)
        disk.cut_power(chance, place)
        trained.check_resume(scenario, place)
    if scenario.action is save:
        assert select.newest(place / "checkpoints").path == place / "checkpoints" / select.name_of(LAST)
    if scenario.action is save_final:
        assert (place / "FINAL").is_dir()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_power_cut_during_a_save(trained: TrainedRun, scenario: Scenario) -> None:
    cut_power(trained, scenario, 20)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_power_cut_at_many_moments_of_a_save(trained: TrainedRun, scenario: Scenario) -> None:
    cut_power(trained, scenario, 500)


def test_a_power_cut_after_a_restart_that_swept_what_a_killed_save_had_replaced(trained: TrainedRun) -> None:
    """The save was killed between its rename and the sync: nothing may be deleted before the rename is there to stay."""
    run_dir, place = trained.directory / "swept", trained.directory / "cut"
    checkpoints, name = run_dir / "checkpoints", select.name_of(LAST)
    hidden = checkpoints / (commit.HIDDEN + name)
    for path in (hidden, checkpoints / (commit.REPLACED + name)):
        shutil.copytree(trained.checkpoint(LAST), path)
    disk, renamed = SimulatedDisk(run_dir), Change("rename", hidden.resolve(), hidden.resolve().with_name(name))
    hidden.rename(checkpoints / name)
    changes = [renamed, *recorded(run_dir, lambda: commit.remove_leftovers(checkpoints))]
    disk.apply(changes)
    for seed in range(20):
        shutil.rmtree(place, ignore_errors=True)
        disk.cut_power(random.Random(seed), place)
        commit.remove_leftovers(place / "checkpoints")
        assert select.newest(place / "checkpoints").path == place / "checkpoints" / name
    shutil.rmtree(run_dir)
