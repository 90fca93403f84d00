"""The sampling engines: each is a module of halos/rollout/engines, found by its name, and declares what other code asks of it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).resolve().parents[1] / "rollout" / "engines"
BASE = "engine"  # the module of their base class


def engine_names() -> tuple[str, ...]:
    """Return what online.sampler.name takes: the modules' names. Those with an underscore are parts of others."""
    return tuple(sorted(path.stem for path in DIRECTORY.glob("*.py") if path.stem != BASE and not path.stem.startswith("_")))


def engine_class(name: str) -> Any:
    """Import an engine's module and return its class, ENGINE. This does not import the packages that the engine samples with."""
    return import_module(f"halos.rollout.engines.{name}").ENGINE
