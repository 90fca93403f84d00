"""A save that is killed anywhere, also half-way through a write, loses at most itself."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scenes import LAST, SCENES, Scene, Stage, same, snapshot
from theatre import Theatre

from halos.checkpoint import select


@pytest.fixture(scope="module", params=["full", "lora"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Stage:
    return Stage(request.param, tmp_path_factory.mktemp(request.param), cache)


def kill(theatre: Theatre, points: list[tuple[int, int]]) -> None:
    for victim, point in points:
        statuses = theatre.play(victim, point)
        assert statuses.pop(victim) == -signal.SIGKILL, theatre.words.read_text()
        assert statuses in ([], [1]), "the other process ends as well, by itself"


def kill_some(theatre: Theatre, number: int) -> None:
    kill(theatre, random.Random(theatre.scene.name).sample(theatre.points, number))


def kill_all(theatre: Theatre, record: Callable[[str, Any], None]) -> None:
    kill(theatre, theatre.points)
    record("points", len(theatre.points))


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_save_that_is_killed_loses_at_most_itself(stage: Stage, scene: Scene) -> None:
    kill_some(Theatre(stage, scene), 3)


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_save_that_is_killed_at_any_point(stage: Stage, scene: Scene, record_property: Callable[[str, Any], None]) -> None:
    kill_all(Theatre(stage, scene), record_property)


SHARED = [scene for scene in SCENES if scene.shared]


@pytest.mark.parametrize("scene", SHARED[1:2], ids=lambda scene: scene.name)
def test_a_save_of_two_processes_of_which_one_is_killed(stage: Stage, scene: Scene) -> None:
    kill_some(Theatre(stage, scene, processes=2), 6)


@pytest.mark.slow
@pytest.mark.parametrize("scene", SHARED, ids=lambda scene: scene.name)
def test_a_save_of_two_processes_of_which_one_is_killed_at_any_point(
    stage: Stage, scene: Scene, record_property: Callable[[str, Any], None]
) -> None:
    kill_all(Theatre(stage, scene, processes=2), record_property)


def test_what_a_scene_counts_as_whole_is_what_a_resume_needs(stage: Stage) -> None:
    """Every killed run is compared with these checkpoints; here they are resumed from, and trained on from."""
    by_two = Theatre(stage, SCENES[1], processes=2).whole
    for source, step in [(stage.shelf, LAST - 1), (stage.shelf, LAST), (by_two, LAST)]:
        run_dir = stage.place / "resumed"
        shutil.rmtree(run_dir, ignore_errors=True)
        others = [select.name_of(other) for other in range(LAST + 1) if other != step]
        shutil.copytree(source, run_dir, ignore=shutil.ignore_patterns("FINAL", "older", *others))
        trainer = stage.resumed(run_dir)
        assert same(snapshot(trainer.run), stage.known[step])
        if step < LAST:
            trainer.step(trainer.order.batch(step))
            assert same(snapshot(trainer.run)["weights"], stage.known[step + 1]["weights"])
