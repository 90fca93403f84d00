"""Packages of the user's own, whose hooks and losses a `_target_` may name."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import ModuleType

from halos.errors import UserError

OWN = "halos"


def make_importable(packages: Sequence[str]) -> None:
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


def code_hash(target: str) -> str | None:
    """A hash of the code that a dotted `target` of the user's own consists of: its module, and those of its package that this one
    imports, wherever they lie. None for ours, whose changes are told otherwise, and for what is not imported."""
    module = sys.modules.get(target.rpartition(".")[0])
    if module is None or module.__name__.partition(".")[0] == OWN:
        return None
    sources = _sources_of(module)
    return hashlib.sha256(b"".join(name.encode() + b"\n" + sources[name] for name in sorted(sources))).hexdigest()


def _sources_of(module: ModuleType) -> dict[str, bytes]:
    """The file of a module, and of what it imports of its own package, directly or not, by their names."""
    package, found, waiting = module.__name__.partition(".")[0], dict[str, bytes](), [module]
    while waiting:
        here = waiting.pop()
        file = Path(here.__file__ or "")
        found[here.__name__] = source = file.read_bytes() if file.is_file() else b""
        imported = _imported(source, here.__package__ or "") if file.suffix == ".py" else ()
        names = {name for name in imported if name.partition(".")[0] == package}
        waiting += [sys.modules[name] for name in sorted(names - found.keys()) if name in sys.modules]
    return found


def _imported(source: bytes, package: str) -> Iterator[str]:
    """Names that may be modules, of those that a source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
