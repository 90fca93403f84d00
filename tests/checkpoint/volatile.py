"""A file system that forgets at a power cut what was not synced, and keeps the rest of it in no order.

A file's bytes are safe after its fsync, a directory's entries after the directory's. Of what came later a power cut keeps
any part: of bytes none, all, a beginning, or a beginning and then zeros; of entries any selection, a rename as a whole.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tapped import Change


@dataclass(eq=False)
class File:
    synced: bytes = b""
    current: bytes = b""

    def survives(self, chance: random.Random) -> bytes:
        if self.current == self.synced:
            return self.synced
        cut = chance.randrange(len(self.current) + 1)
        zeros = bytes(len(self.current) - cut)
        return chance.choice([self.synced, self.current, self.current[:cut], self.current[:cut] + zeros])


@dataclass(frozen=True)
class Entry:
    """One pending change of a directory: `gone` leaves it, `name` becomes `node`."""

    gone: str | None = None
    name: str | None = None
    node: File | Directory | None = None


@dataclass(eq=False)
class Directory:
    synced: dict[str, File | Directory] = field(default_factory=dict)
    current: dict[str, File | Directory] = field(default_factory=dict)
    pending: list[Entry] = field(default_factory=list)

    def change(self, entry: Entry) -> None:
        self.pending.append(entry)
        _apply(entry, self.current)

    def sync(self) -> None:
        self.synced, self.pending = dict(self.current), []

    def survives(self, chance: random.Random) -> dict[str, File | Directory]:
        kept, share = dict(self.synced), chance.choice([0.0, 0.2, 0.5, 0.8, 1.0])
        for entry in self.pending:
            if chance.random() < share:
                _apply(entry, kept)
        return kept


def _apply(entry: Entry, entries: dict[str, File | Directory]) -> None:
    if entry.gone is not None:
        entries.pop(entry.gone, None)
    if entry.name is not None and entry.node is not None:
        entries[entry.name] = entry.node


class Volatile:
    """Starts as what lies in `root`, all of it safe; then changes are played to it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.top = _read(self.root)

    def play(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if change.kind == "fsync":
                node = self._at(change.path)
                if isinstance(node, Directory):
                    node.sync()
                else:
                    node.synced = node.current
            elif change.kind == "write":
                file = self._file(change.path)
                file.current += change.data
            else:
                self._change_entries(change)

    def _change_entries(self, change: Change) -> None:
        parent, name = self._directory(change.path.parent), change.path.name
        if change.kind == "open" and name in parent.current:
            self._file(change.path).current = b""
        elif change.kind == "open":
            parent.change(Entry(name=name, node=File()))
        elif change.kind == "mkdir" and name not in parent.current:
            parent.change(Entry(name=name, node=Directory()))
        elif change.kind in ("unlink", "rmdir") and name in parent.current:
            parent.change(Entry(gone=name))
        elif change.kind == "rename":
            assert change.other is not None
            assert change.other.parent == change.path.parent, "only within a directory is a rename one change"
            parent.change(Entry(gone=name, name=change.other.name, node=parent.current[name]))

    def cut(self, chance: random.Random, place: Path) -> None:
        """What a power cut now may leave, at `place`."""
        _write(self.top, place, chance)

    def _at(self, path: Path) -> File | Directory:
        node: File | Directory = self.top
        for name in path.relative_to(self.root).parts:
            assert isinstance(node, Directory)
            node = node.current[name]
        return node

    def _directory(self, path: Path) -> Directory:
        node = self._at(path)
        assert isinstance(node, Directory)
        return node

    def _file(self, path: Path) -> File:
        node = self._at(path)
        assert isinstance(node, File)
        return node


def _read(path: Path) -> Directory:
    found: dict[str, File | Directory] = {}
    for entry in path.iterdir():
        content = _read(entry) if entry.is_dir() else entry.read_bytes()
        found[entry.name] = content if isinstance(content, Directory) else File(content, content)
    return Directory(dict(found), dict(found))


def _write(directory: Directory, place: Path, chance: random.Random) -> None:
    place.mkdir()
    for name, node in directory.survives(chance).items():
        if isinstance(node, Directory):
            _write(node, place / name, chance)
        else:
            (place / name).write_bytes(node.survives(chance))
