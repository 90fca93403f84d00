"""A save that is killed at any point, even in the middle of a write, loses at most itself."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash_harness import CrashHarness
from save_scenarios import LAST, SCENARIOS, Scenario, TrainedRun, same, snapshot

from halos.checkpoint import select


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> TrainedRun:
    return TrainedRun(request.param, tmp_path_factory.mktemp(request.param), cache)


def kill(harness: CrashHarness, points: list[tuple[int, int]]) -> None:
    for victim, point in points:
        statuses = harness.run(victim, point)
        assert statuses.pop(victim) == -signal.SIGKILL, harness.output.read_text()
        assert statuses in ([], [1]), "the other process ends as well, by itself"


def kill_some(harness: CrashHarness, number: int) -> None:
    kill(harness, random.Random(harness.scenario.name).sample(harness.points, number))


def kill_all(harness: CrashHarness, record: Callable[[str, Any], None]) -> None:
    kill(harness, harness.points)
    record("points", len(harness.points))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_save_that_is_killed_loses_at_most_itself(trained: TrainedRun, scenario: Scenario) -> None:
    kill_some(CrashHarness(trained, scenario), 3)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_save_that_is_killed_at_any_point(
    trained: TrainedRun, scenario: Scenario, record_property: Callable[[str, Any], None]
) -> None:
    kill_all(CrashHarness(trained, scenario), record_property)


SHARED = [scenario for scenario in SCENARIOS if scenario.shared]


@pytest.mark.parametrize("scenario", SHARED[1:2], ids=lambda scenario: scenario.name)
def test_a_save_of_two_processes_of_which_one_is_killed(trained: TrainedRun, scenario: Scenario) -> None:
    kill_some(CrashHarness(trained, scenario, processes=2), 6)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SHARED, ids=lambda scenario: scenario.name)
def test_a_save_of_two_processes_of_which_one_is_killed_at_any_point(
    trained: TrainedRun, scenario: Scenario, record_property: Callable[[str, Any], None]
) -> None:
    kill_all(CrashHarness(trained, scenario, processes=2), record_property)


def test_what_a_scene_counts_as_whole_is_what_a_resume_needs(trained: TrainedRun) -> None:
    """Every killed run is compared with these checkpoints; here they are resumed from, and trained on from."""
    by_two = CrashHarness(trained, SCENARIOS[1], processes=2).whole
    for source, step in [(trained.templates, LAST - 1), (trained.templates, LAST), (by_two, LAST)]:
        run_dir = trained.directory / "resumed"
        shutil.rmtree(run_dir, ignore_errors=True)
        others = [select.name_of(other) for other in range(LAST + 1) if other != step]
        shutil.copytree(source, run_dir, ignore=shutil.ignore_patterns("FINAL", "older", *others))
        trainer = trained.resumed(run_dir)
        assert same(snapshot(trainer.run), trained.snapshots[step])
        if step < LAST:
            trainer.step(trainer.order.batch(step))
            assert same(snapshot(trainer.run)["weights"], trained.snapshots[step + 1]["weights"])
