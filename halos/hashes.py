"""SHA-256 of files, cached in cache_dir until the file changes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from halos import confined
from halos.errors import UserError

SETTLED = 2.0  # seconds since a file's last change after which another change would show in its times
READERS = 4  # files hashed at once, as the shards of one model are

FileStat = tuple[str, int, int, int, int]  # path, inode, size, mtime, ctime
_cache: dict[FileStat, str] = {}


def digest(path: Path) -> str:
    """Hash the file's current content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path, cache: Path | None = None) -> str:
    """Hash a file, or return the hash cached for its path, inode, size and times in this process or in `cache` (a cache_dir)."""
    stat = _stat(path)
    if stat in _cache:
        return _cache[stat]
    entry = cache.expanduser() / "hashes" / hashlib.sha256(stat[0].encode()).hexdigest()[:32] if cache is not None else None
    value = _read_entry(entry, stat) if entry is not None else None
    if value is None:
        value = digest(path)
        if _stat(path) != stat or time.time_ns() - max(stat[3:]) < SETTLED * 1e9:
            return value  # it may change again within the resolution of its file system's times
        if entry is not None:
            _write_entry(entry, stat, value)
    _cache[stat] = value
    return value


def file_hashes(paths: Iterable[Path], cache: Path | None = None) -> dict[str, str]:
    """Hash files in parallel; return the hashes by file name."""
    paths = list(paths)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip((path.name for path in paths), pool.map(lambda path: file_hash(path, cache), paths), strict=True))


@functools.cache
def source_hash(parts: tuple[str, ...]) -> str:
    """Hash source files of this package: `parts` are modules or packages, by their paths in it."""
    home, whole = Path(__file__).resolve().parent, hashlib.sha256()
    for part in parts:
        for path in sorted((home / part).glob("*.py")) if (home / part).is_dir() else [home / part]:
            whole.update(path.read_bytes())
    return whole.hexdigest()


def json_hash(value: Any) -> str:
    """Hash a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def short(value: str | None) -> str:
    """Shorten a hash for display. The hash of a data source may start with its split."""
    return value.split()[-1][:12] if value else "none"


def _stat(path: Path) -> FileStat:
    real = os.path.realpath(path)
    stat = os.stat(real)
    return real, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns  # ctime shows a file whose mtime was set back


def _read_entry(path: Path, stat: FileStat) -> str | None:
    try:
        entry = confined.load_object(path)
    except UserError:
        return None
    value = entry.get("sha256")
    return value if entry.get("facts") == list(stat) and isinstance(value, str) and len(value) == 64 else None


def _write_entry(path: Path, stat: FileStat, value: str) -> None:
    """Best effort: a hash that cannot be cached is computed again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        confined.write_whole(path, json.dumps({"facts": stat, "sha256": value}) + "\n")
    except OSError:
        return
