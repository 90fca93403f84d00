"""SHA-256 of files, each read once for as long as it stays what it was, over all starts that share a cache_dir."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from halos import confined
from halos.errors import UserError

SETTLED = 2.0  # seconds after its last change from which on another change would show in a file's times
READERS = 4  # files hashed at once, as the shards of one model are

Facts = tuple[str, int, int, int, int]
_known: dict[Facts, str] = {}


def digest(path: Path) -> str:
    """Of what stands in the file now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path, cache: Path | None = None) -> str:
    """`digest`, kept by path, inode, size and times in this process and, where one is given, below `cache` (a cache_dir)."""
    facts = _facts(path)
    if facts in _known:
        return _known[facts]
    place = cache.expanduser() / "hashes" / hashlib.sha256(facts[0].encode()).hexdigest()[:32] if cache is not None else None
    found = _kept(place, facts) if place is not None else None
    if found is None:
        found = digest(path)
        if _facts(path) != facts or time.time_ns() - max(facts[3:]) < SETTLED * 1e9:
            return found  # it may change once more within what its file system tells apart
        if place is not None:
            _keep(place, facts, found)
    _known[facts] = found
    return found


def file_hashes(paths: Iterable[Path], cache: Path | None = None) -> dict[str, str]:
    """By name, several at a time."""
    paths = list(paths)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip((path.name for path in paths), pool.map(lambda path: file_hash(path, cache), paths), strict=True))


def short(value: str | None) -> str:
    """As people compare them. The hash of a source may name its split first."""
    return value.split()[-1][:12] if value else "none"


def _facts(path: Path) -> Facts:
    whole = os.path.realpath(path)
    facts = os.stat(whole)
    return whole, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns  # a file set back in time shows in the last


def _kept(place: Path, facts: Facts) -> str | None:
    try:
        kept = confined.load_object(place)
    except UserError:
        return None
    value = kept.get("sha256")
    return value if kept.get("facts") == list(facts) and isinstance(value, str) and len(value) == 64 else None


def _keep(place: Path, facts: Facts, value: str) -> None:
    """As good as it goes: what cannot be kept is read again."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        confined.write_whole(place, json.dumps({"facts": facts, "sha256": value}) + "\n")
    except OSError:
        return
