"""Configurations as train.py makes them of overrides, with Hydra's compositions remembered for this test run.

Hydra takes an eighth of a second to compose, and tests ask for the same choices a thousand times. Every process of a test
run finds what was composed in one directory, whose path is in the environment. Only of this repository's config/, under the hash
of all its files: what else is composed, or in tests marked cold and slow, is composed anew.
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from halos.cli.compose import ConfigTree
    from halos.config.schema import Config

VARIABLE = "HALOS_TESTS_COMPOSED"
CONFIG = Path(__file__).resolve().parents[1] / "config"


def config_of(*overrides: str) -> Config:
    """Composed and validated; raises UserError as a run would."""
    from halos.cli.overrides import parse
    from halos.config import validate

    tree = _tree()
    composed, resolved = tree.compose_parsed([parse(text, tree.choices) for text in overrides])
    return validate.check(composed, [one.text for one in resolved], tree.choices)


@cache
def _tree() -> ConfigTree:
    from halos.cli.compose import ConfigTree

    return ConfigTree()


def _parse_once() -> None:
    """Keep what OmegaConf made of a file of config/, which is a third of a composition, until the file changes."""
    from omegaconf import OmegaConf

    load, known = OmegaConf.load, dict[tuple[str, int, int], bytes]()

    def parsed(file: Any) -> Any:
        path = Path(getattr(file, "name", file))
        if not path.is_relative_to(CONFIG):
            return load(file)
        status = path.stat()
        key = str(path), status.st_mtime_ns, status.st_size
        if key not in known:
            known[key] = pickle.dumps(load(file))
        return pickle.loads(known[key])

    OmegaConf.load = staticmethod(parsed)


def share() -> None:
    """A directory for this test run, if it has none yet: pytest's workers and the processes of tests inherit the variable."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = mkdtemp(prefix="halos-composed-")
        atexit.register(rmtree, os.environ[VARIABLE], ignore_errors=True)


@cache
def remember() -> None:
    """From here on `hydra.compose` looks first whether that has been composed, and no file of config/ is parsed twice."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    _parse_once()

    compose, files = hydra.compose, b"".join(sha256(path.read_bytes()).digest() for path in sorted(CONFIG.rglob("*.yaml")))

    def is_ours(overrides: Sequence[str]) -> bool:
        searched = GlobalHydra.instance().config_loader().get_search_path().get_path()
        paths = {
            entry.path.removeprefix("file://") for entry in searched if not entry.path.startswith(("pkg://", "structured://"))
        }
        return paths == {str(CONFIG)} and not any(word.startswith("hydra.searchpath") for word in overrides)

    def remembered(config_name: str, overrides: Sequence[str] = (), **settings: Any) -> DictConfig:
        if VARIABLE not in os.environ or not is_ours(overrides):
            return compose(config_name, list(overrides), **settings)
        keys = {word.partition("=")[0] for word in overrides}
        commute = len(keys) == len(overrides) and all(key.isidentifier() for key in keys)  # each chooses in a group of its own
        asked = repr((config_name, sorted(overrides) if commute else list(overrides), sorted(settings.items()))).encode()
        path = Path(os.environ[VARIABLE], sha256(files + asked).hexdigest())
        if not path.exists():
            whole = path.with_name(f"{path.name}.{os.getpid()}")
            whole.write_bytes(pickle.dumps(compose(config_name, list(overrides), **settings)))
            whole.rename(path)
        return pickle.loads(path.read_bytes())

    hydra.compose = remembered
