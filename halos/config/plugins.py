"""Packages of the user's own, whose hooks and losses a `_target_` may name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from halos.errors import UserError


def admit(packages: Sequence[str]) -> None:
    """Makes sure that Python finds each package: installed, on PYTHONPATH, or in the current directory.

    `python train.py` does not look into the current directory by itself; it is looked into last, and only for what was
    typed. Raises UserError for a package that is nowhere.
    """
    for package in packages:
        name = package.partition(".")[0]
        here = Path.cwd()
        if not package.isidentifier() and not all(part.isidentifier() for part in package.split(".")):
            raise UserError(f"plugins names {package!r}, which is no package: plugins=[mypackage]")
        if name in sys.modules or find_spec(name) is not None:
            continue
        if not (here / name).is_dir() and not (here / f"{name}.py").is_file():
            raise UserError(
                f"plugins names {package!r}, which Python does not find: install it, start where it lies, or put its directory on"
                " PYTHONPATH"
            )
        sys.path.append(str(here))
