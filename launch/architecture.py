#!/usr/bin/env python3
"""Draw the architecture from the code: every package of halos with its purpose, above all packages that it imports.

python launch/architecture.py > halos/README.md
"""

import ast
import sys
from pathlib import Path

HALOS = Path(__file__).resolve().parents[1] / "halos"
HEAD = """# The packages

Back to [the front page](../README.md). Written by `python launch/architecture.py` from the imports and the first docstring
line of each package or module. Each imports only from the blocks below its own. `train.py` is the entry point, `config/` holds
every default, and `tests/` mirrors this directory.
"""


def packages() -> dict[str, list[Path]]:
    """Return the packages and top-level modules of halos with their files."""
    directories = {path.name: sorted(path.rglob("*.py")) for path in HALOS.iterdir() if (path / "__init__.py").is_file()}
    return directories | {path.stem: [path] for path in HALOS.glob("*.py") if path.stem != "__init__"}


def imported_by(files: list[Path]) -> set[str]:
    """Return the packages that files import, at any level; a package's command, __main__.py, may import everything."""
    imports, files = set(), [file for file in files if file.name != "__main__.py"]
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "halos":
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            imports |= set(names)
        elif isinstance(node, ast.Import):
            imports |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("halos.")}
    return imports


def purpose(files: list[Path]) -> str:
    """Return the first line of a package's docstring."""
    docstring = ast.get_docstring(ast.parse(files[0].read_text(encoding="utf-8")))
    assert docstring, f"{files[0]} has no docstring"
    return docstring.partition("\n")[0]


def floors(below: dict[str, set[str]]) -> list[list[tuple[str, ...]]]:
    """Return packages from the top, by the longest chain of imports below them; those that import each other form a group."""
    reach = {package: _reachable(package, below) for package in below}
    groups = {
        package: tuple(sorted({other for other in reach[package] if package in reach[other]} | {package})) for package in below
    }
    heights: dict[tuple[str, ...], int] = {}

    def height(group: tuple[str, ...]) -> int:
        if group not in heights:
            others = {groups[other] for package in group for other in below[package]} - {group}
            heights[group] = 1 + max(map(height, others), default=-1)
        return heights[group]

    for group in groups.values():
        height(group)
    return [sorted(group for group in heights if heights[group] == level) for level in range(max(heights.values()), -1, -1)]


def _reachable(package: str, below: dict[str, set[str]]) -> set[str]:
    seen, ahead = set[str](), [package]
    while ahead:
        for other in below[ahead.pop()] - seen:
            seen.add(other)
            ahead.append(other)
    return seen


def drawing() -> str:
    files = packages()
    below = {package: imported_by(paths) & files.keys() - {package} for package, paths in files.items()}
    lines, widest = [], max(map(len, files))
    for level in floors(below):
        for group in level:
            for number, package in enumerate(group):
                mark = "+" if number else " "
                lines.append(f"{mark} {package:{widest}}  {purpose(files[package])}")
        lines.append("")
    return f"{HEAD}\n```\n" + "\n".join(lines).rstrip() + "\n```\n"


if __name__ == "__main__":
    sys.stdout.write(drawing())
