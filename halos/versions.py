"""Versions for the record of an attempt: this code's, its commit, and those of its dependencies."""

import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halos import __version__

PACKAGES = ("torch", "transformers", "accelerate", "peft", "hydra-core", "omegaconf", "datasets", "safetensors", "deepspeed")


def versions() -> dict[str, Any]:
    """Return all versions; None for a package that is not installed, and for the commit outside a repository."""
    return {
        "halos": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(_packages()),
        "argv0": Path(sys.argv[0]).name,
    }


@cache  # what this process has imported, which an installation meanwhile does not change
def _packages() -> dict[str, str | None]:
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _git_commit() -> str | None:
    """Return the commit of this code, marked -dirty if it was edited since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return described.stdout.strip() or None
