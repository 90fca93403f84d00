"""A simulated disk that loses unsynced changes at a power cut, and keeps any selection of them in any order.

A file's bytes are safe after its fsync, a directory's entries after the directory's. Of what came later a power cut keeps
any part: of bytes none, all, a beginning, or a beginning and then zeros; of entries any selection, a rename as a whole.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fs_recorder import Change


@dataclass(eq=False)
class File:
    synced: bytes = b""
    current: bytes = b""

    def survives(self, chance: random.Random) -> bytes:
        if self.current == self.synced:
            return self.synced
        length = chance.randrange(len(self.current) + 1)
        zeros = bytes(len(self.current) - length)
        return chance.choice([self.synced, self.current, self.current[:length], self.current[:length] + zeros])


@dataclass(frozen=True)
class Entry:
    """A pending change of a directory: `gone` is removed, `name` becomes `node`."""

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
        kept, fraction = dict(self.synced), chance.choice([0.0, 0.2, 0.5, 0.8, 1.0])
        for entry in self.pending:
            if chance.random() < fraction:
                _apply(entry, kept)
        return kept


def _apply(entry: Entry, entries: dict[str, File | Directory]) -> None:
    if entry.gone is not None:
        entries.pop(entry.gone, None)
    if entry.name is not None and entry.node is not None:
        entries[entry.name] = entry.node


class SimulatedDisk:
    """Starts with the files of `root`, all synced; then changes are applied."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.top = _read(self.root)

    def apply(self, changes: Iterable[Change]) -> None:
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

    def cut_power(self, chance: random.Random, output: Path) -> None:
        """Write to `output` what a power cut now might leave."""
        _write(self.top, output, chance)

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
    entries: dict[str, File | Directory] = {}
    for entry in path.iterdir():
        content = _read(entry) if entry.is_dir() else entry.read_bytes()
        entries[entry.name] = content if isinstance(content, Directory) else File(content, content)
    return Directory(dict(entries), dict(entries))


def _write(directory: Directory, output: Path, chance: random.Random) -> None:
    output.mkdir()
    for name, node in directory.survives(chance).items():
        if isinstance(node, Directory):
            _write(node, output / name, chance)
        else:
            (output / name).write_bytes(node.survives(chance))
