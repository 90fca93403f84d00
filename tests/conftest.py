"""Shared fixtures: configs as the command line makes them, and runs of a small model on the bundled data.

Heavy imports are inside the fixtures that need them, so that a test of a pure function starts at once.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import composed, processes
from tests.forked import COLLECT_AFTER

if TYPE_CHECKING:
    from halos.config.schema import Config
    from halos.rundir import RunDir
    from halos.trainers.base import Trainer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "launch"))  # as halos.cli does: Hydra searches for plugins once, in whichever test comes first
for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):  # before anything reads them
    os.environ[name] = "1"

SMALL = ["model=tiny", "data=arithmetic", "data.train=[{path: arithmetic, split: 'train[:48]'}]",
         "data.eval=[{path: arithmetic, split: 'eval[:12]'}]"]  # fmt: skip


gc.set_threshold(*COLLECT_AFTER)
composed.share()
COMPOSED = os.environ[composed.VARIABLE]
imported = 0  # modules whose objects no collection walks


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not processes.ALWAYS_COLD:  # not in the workers, which inherit its address
        threading.Thread(target=processes.zygote, daemon=True).start()  # it imports what it needs while workers collect


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: not item.path.is_relative_to(ROOT / "tests" / "launch")
    )  # the longest first: workers end together


def pytest_collection_finish() -> None:
    # what is compiled by now serves later processes; tests edit modules within a second, which a compiled one does not notice
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    freeze_imports()


def freeze_imports() -> None:
    """Once many modules were imported: every full collection would walk them, and transformers collects twice when it samples."""
    global imported
    if len(sys.modules) > imported + 100:
        gc.collect()
        gc.freeze()
        imported = len(sys.modules)


def pytest_runtest_setup(item: pytest.Item) -> None:
    freeze_imports()
    processes.cold = processes.ALWAYS_COLD or any(map(item.get_closest_marker, ("slow", "cold")))
    if processes.cold:
        os.environ.pop(composed.VARIABLE, None)
    else:
        os.environ[composed.VARIABLE] = COMPOSED
    if "hydra" in sys.modules:  # a test of a pure function needs none
        composed.remember()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    # a run's log file would be opened again, when the directory of a test that has passed is gone
    logger, place = logging.getLogger("halos"), getattr(item, "funcargs", {}).get("tmp_path")
    for handler in list(logger.handlers):
        if place and isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).is_relative_to(place):
            logger.removeHandler(handler)
            handler.close()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache_dir of all tests, also of resumed runs, which use the default and not the saved run's."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["HALOS_CACHE"] = str(path)
    return path


def compose(cache: Path, output_root: Path, *overrides: str) -> Config:
    """Return a small run's config, validated as train.py does."""
    return composed.config_of(*SMALL, f"cache_dir={cache}", f"output_root={output_root}", "exp_name=run", *overrides)


@pytest.fixture
def saved_twice(tmp_path: Path) -> RunDir:
    """A run that has committed checkpoints of steps 2 and 4, which are almost empty."""
    from halos.checkpoint import manifest, select
    from halos.rundir import RunDir

    directory = RunDir(tmp_path / "saved")
    for step in (2, 4):
        path = directory.checkpoints / select.name_of(step)
        path.mkdir(parents=True)
        (path / "weights").write_text(str(step))
        (path / manifest.NAME).write_text(manifest.describe(path, {"step": step}))
        select.record_commit(directory, path)
    return directory


@pytest.fixture
def configure(tmp_path: Path, cache: Path) -> Callable[..., Config]:
    """`configure("loss=dpo", ...)`: the config of a small run."""
    return partial(compose, cache, tmp_path)


@pytest.fixture
def trainer(configure: Callable[..., Config]) -> Callable[..., Trainer]:
    """`trainer("loss=dpo", ...)`: an assembled trainer, before its first step."""
    from halos.distributed.launch import make_accelerator
    from halos.run.assemble import assemble

    def make(*overrides: str) -> Trainer:
        config = configure(*overrides)
        trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
        assert trainer is not None
        trainer.prepare_reference()  # while the policy is the one that the run starts with
        return trainer

    return make


@pytest.fixture
def command(tmp_path: Path, cache: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command("loss=dpo", ..., launch=2)`: train.py as a user starts it, on one process or under accelerate."""

    def start(*words: str, launch: int = 1, config: str = "cpu2", check: bool = True) -> subprocess.CompletedProcess[str]:
        launcher = []
        if launch > 1:
            config = str(ROOT / "launch" / "accelerate" / f"{config}.yaml")
            launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(launch)]
        new = (
            [] if any(word.startswith("resume=") for word in words) else [*SMALL, f"cache_dir={cache}", f"output_root={tmp_path}"]
        )
        typed = [sys.executable, *launcher, str(ROOT / "train.py"), *new, *words]
        done = processes.run(typed, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return start
