"""Sampling engines and scorers: each is a module of its package in halos/rollout, found by its name, and declares what other code
asks of it."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

ENGINES, SCORERS = "halos.rollout.engines", "halos.rollout.scorers"
BASES = ("engine", "scorer")  # the modules of their base classes


def engine_names() -> tuple[str, ...]:
    """Return what online.sampler.name takes: the modules' names."""
    return _names(ENGINES)


def engine_class(name: str) -> Any:
    """Import an engine's module and return its class, ENGINE. This does not import the packages that the engine samples with."""
    return import_module(f"{ENGINES}.{name}").ENGINE


def scorer_names() -> tuple[str, ...]:
    """Return what online.scorer.name takes: the modules' names."""
    return _names(SCORERS)


def scorer_class(name: str) -> Any:
    """Import a scorer's module and return its class, SCORER. This does not import the packages that the scorer needs."""
    return import_module(f"{SCORERS}.{name}").SCORER


def _names(package: str) -> tuple[str, ...]:
    """Return the names of the modules of a package. Those with an underscore are parts of others."""
    names = (module.name for module in iter_modules(import_module(package).__path__))
    return tuple(sorted(name for name in names if name not in BASES and not name.startswith("_")))
