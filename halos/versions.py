"""By what a run was made: this code's version and commit, and those of what it stands on."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halos import __version__

PACKAGES = ("torch", "transformers", "accelerate", "peft", "hydra-core", "omegaconf", "datasets", "safetensors", "deepspeed")


def versions() -> dict[str, Any]:
    """For the record of an attempt; null where a package, or a repository, is not there."""
    return {
        "halos": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in PACKAGES},
        "argv0": Path(sys.argv[0]).name,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this code, with a mark where it was edited since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return described.stdout.strip() or None
