"""User packages (`plugins`), whose code a `_target_` or a data format may name."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from weakref import WeakKeyDictionary

from halos.errors import UserError

LIBRARIES = ("halos", "torch", "transformers", "accelerate", "peft", "deepspeed")  # runs record their versions, not their code
# the sources of imported modules when they were first read, which is right after the import
_FIRST_READ: WeakKeyDictionary[ModuleType, tuple[ModuleSpec | None, bytes]] = WeakKeyDictionary()


def make_importable(packages: Sequence[str]) -> None:
    """Make each package importable: installed, on PYTHONPATH, or in the current directory.

    `python train.py` does not search the current directory by itself; it is searched last, and only for packages named in
    `plugins`. Raises UserError for a package that does not exist.
    """
    for package in packages:
        if not isinstance(package, str) or not all(part.isidentifier() for part in package.split(".")):
            raise UserError(f"plugins names {package!r}, which is no package: plugins=[mypackage]")
        name, here = package.partition(".")[0], Path.cwd()
        if name in sys.modules or find_spec(name) is not None:
            continue
        if not (here / name).is_dir() and not (here / f"{name}.py").is_file():
            raise UserError(
                f"plugins names {package!r}, which Python does not find: install it, start in its directory, or put that on"
                " PYTHONPATH"
            )
        sys.path.append(str(here))


def code_hash(target: str) -> str | None:
    """Hash the code of a user's dotted `target`: its module, and what this imports, also in functions and indirectly, of its own
    package and of those that are not installed, such as other plugins. Nothing is imported.

    None for a target of halos, whose changes arithmetic_version.py records, for one of a library whose version a run records, and
    for a module that does not exist. Raises UserError for code that was edited since this process imported it.
    """
    module = target.rpartition(".")[0]
    if module.partition(".")[0] in LIBRARIES or not _exists(module):
        return None
    sources = _sources_of(module)
    return hashlib.sha256(b"".join(name.encode() + b"\n" + sources[name] for name in sorted(sources))).hexdigest()


def _sources_of(module: str) -> dict[str, bytes]:
    """Return the source of a module and of the user's modules that it imports: name -> bytes."""
    package, sources, queue = module.partition(".")[0], dict[str, bytes](), [module]
    while queue:
        name = queue.pop()
        file = _file_of(name)
        sources[name] = source = _source(name, file) if file is not None and file.is_file() else b""
        inside = name if file is not None and file.stem == "__init__" else name.rpartition(".")[0]
        imported = _imported(source, inside) - sources.keys() if file is not None and file.suffix == ".py" else ()
        queue += [each for each in sorted(imported) if _is_followed(each, package)]
    return sources


def _is_followed(name: str, package: str) -> bool:
    """Return whether a module is of `package`, or of another one that is neither installed nor a part of Python."""
    top = name.partition(".")[0]
    if top == package:
        return _exists(name)
    if top in LIBRARIES or top in sys.stdlib_module_names:
        return False
    file = _file_of(name)
    return file is not None and not {"site-packages", "dist-packages"} & set(file.parts)


def _source(name: str, file: Path) -> bytes:
    """Return the source of a module. Raises UserError if it is imported, and differs from what was first read."""
    source, module = file.read_bytes(), sys.modules.get(name)
    if module is not None:
        spec, first = _FIRST_READ.get(module, (None, b""))
        if spec is not module.__spec__:  # not read before, or reloaded since
            _FIRST_READ[module] = (module.__spec__, source)
        elif first != source:
            raise UserError(f"{file} has been edited since this process imported it: start a new process")
    return source


def _exists(name: str) -> bool:
    return name in sys.modules or _spec_of(name) is not None


def _file_of(name: str) -> Path | None:
    """Return the file of a module, which need not be imported; None for a namespace package or where there is none."""
    module = sys.modules.get(name)
    spec = _spec_of(name) if module is None else None
    file = getattr(module, "__file__", None) if spec is None else spec.origin if spec.has_location else None
    return Path(file) if file else None


def _spec_of(name: str) -> ModuleSpec | None:
    """Find a module that is not imported. Unlike find_spec this imports no parent."""
    parent = name.rpartition(".")[0]
    if not parent:
        return find_spec(name) if name else None
    module = sys.modules.get(parent)
    spec = _spec_of(parent) if module is None else module.__spec__
    below = None if spec is None else spec.submodule_search_locations
    return None if below is None else _spec_in(name, list(below))


def _spec_in(name: str, directories: Sequence[str]) -> ModuleSpec | None:
    try:
        return PathFinder.find_spec(name, directories)
    except KeyError:  # a namespace package, of which Python's own spec needs the parent imported
        spec = ModuleSpec(name, None, is_package=True)
        below = (Path(each) / name.rpartition(".")[2] for each in directories)
        spec.submodule_search_locations = [str(each) for each in below if each.is_dir()]
        return spec


@cache  # every target of a package asks for the same modules
def _imported(source: bytes, package: str) -> frozenset[str]:
    """Return the imported names of a source that may be modules."""
    names = set[str]()
    try:
        nodes = ast.walk(ast.parse(source))
    except SyntaxError:  # of a module that is not imported, or not yet
        return frozenset()
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:  # `import a.b` binds a, with what that has itself
                parts = alias.name.split(".")
                names |= {".".join(parts[:end]) for end in range(len(parts) if alias.asname else 1, len(parts) + 1)}
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            base = f"{above}.{node.module or ''}".strip(".") if node.level else node.module or ""
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return frozenset(names)
