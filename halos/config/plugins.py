"""User packages (`plugins`), whose code a `_target_` or a data format may name."""

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
    """Make each package importable: installed, on PYTHONPATH, or in the current directory.

    `python train.py` does not search the current directory by itself; it is searched last, and only for packages named in
    `plugins`. Raises UserError for a package that does not exist.
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
                f"plugins names {package!r}, which Python does not find: install it, start in its directory, or put that on"
                " PYTHONPATH"
            )
        sys.path.append(str(here))


def code_hash(target: str) -> str | None:
    """Hash the code of a user's dotted `target`: its module, and all modules of its package that it imports. None for a target of
    halos, whose changes arithmetic_version.py records, and for a module that is not imported."""
    module = sys.modules.get(target.rpartition(".")[0])
    if module is None or module.__name__.partition(".")[0] == OWN:
        return None
    sources = _sources_of(module)
    return hashlib.sha256(b"".join(name.encode() + b"\n" + sources[name] for name in sorted(sources))).hexdigest()


def _sources_of(module: ModuleType) -> dict[str, bytes]:
    """Return the source of a module and of all modules of its package that it imports, also indirectly: name -> bytes."""
    package, sources, queue = module.__name__.partition(".")[0], dict[str, bytes](), [module]
    while queue:
        current = queue.pop()
        file = Path(current.__file__ or "")
        sources[current.__name__] = source = file.read_bytes() if file.is_file() else b""
        imported = _imported(source, current.__package__ or "") if file.suffix == ".py" else ()
        names = {name for name in imported if name.partition(".")[0] == package}
        queue += [sys.modules[name] for name in sorted(names - sources.keys()) if name in sys.modules]
    return sources


def _imported(source: bytes, package: str) -> Iterator[str]:
    """Return the imported names of a source that may be modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
