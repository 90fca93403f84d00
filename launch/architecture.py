#!/usr/bin/env python3
"""The architecture as the code has it: every room of halos with what it is for, above all rooms that it imports.

python launch/architecture.py > halos/README.md
"""

import ast
import sys
from pathlib import Path

HALOS = Path(__file__).resolve().parents[1] / "halos"
HEAD = """# The rooms

Back to [the front page](../README.md). Written by `python launch/architecture.py`, from the imports and the first line of each
room (a package or module). A room imports only rooms of the blocks below it. `train.py` is the entry,
`config/` has every default, `tests/` mirrors what is here.
"""


def rooms() -> dict[str, list[Path]]:
    """Packages and modules of halos, with their files."""
    found = {path.name: sorted(path.rglob("*.py")) for path in HALOS.iterdir() if (path / "__init__.py").is_file()}
    return found | {path.stem: [path] for path in HALOS.glob("*.py") if path.stem != "__init__"}


def imported_by(files: list[Path]) -> set[str]:
    """Rooms that files import, wherever the import stands; a room's own command stands above all rooms."""
    found, files = set(), [file for file in files if file.name != "__main__.py"]
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "halos":
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            found |= set(names)
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("halos.")}
    return found


def purpose(files: list[Path]) -> str:
    """The first line of a room's docstring."""
    told = ast.get_docstring(ast.parse(files[0].read_text(encoding="utf-8")))
    assert told, f"{files[0]} does not say what it is for"
    return told.partition("\n")[0]


def floors(below: dict[str, set[str]]) -> list[list[tuple[str, ...]]]:
    """From the top: rooms by the longest chain of imports below them; those that import each other together."""
    reach = {room: _reachable(room, below) for room in below}
    groups = {room: tuple(sorted({other for other in reach[room] if room in reach[other]} | {room})) for room in below}
    heights: dict[tuple[str, ...], int] = {}

    def height(group: tuple[str, ...]) -> int:
        if group not in heights:
            others = {groups[other] for room in group for other in below[room]} - {group}
            heights[group] = 1 + max(map(height, others), default=-1)
        return heights[group]

    for group in groups.values():
        height(group)
    return [sorted(group for group in heights if heights[group] == level) for level in range(max(heights.values()), -1, -1)]


def _reachable(room: str, below: dict[str, set[str]]) -> set[str]:
    seen, ahead = set[str](), [room]
    while ahead:
        for other in below[ahead.pop()] - seen:
            seen.add(other)
            ahead.append(other)
    return seen


def drawing() -> str:
    files = rooms()
    below = {room: imported_by(paths) & files.keys() - {room} for room, paths in files.items()}
    lines, widest = [], max(map(len, files))
    for level in floors(below):
        for group in level:
            for number, room in enumerate(group):
                mark = "+" if number else " "
                lines.append(f"{mark} {room:{widest}}  {purpose(files[room])}")
        lines.append("")
    return f"{HEAD}\n```\n" + "\n".join(lines).rstrip() + "\n```\n"


if __name__ == "__main__":
    sys.stdout.write(drawing())
