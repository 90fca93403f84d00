"""Parts of the cache of tokenised rows: one that a run reads or writes is not removed, and each knows when it was last used."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from halos import examples

DATA, SHARDS, STREAMS = "data", "shards", "streams"  # directories of cache_dir
LOCKS = "locks"  # another, which is never removed, since locks may be held
META = "meta.json"  # of a data set, or of a shard
ABOUT = "about.json"  # of the shards of a source: what they are made of

_kept: dict[Path, Held] = {}


class Held:
    """A part of the cache, `data/KEY` or `shards/KEY`, which nobody removes until this is closed, or the process ends."""

    def __init__(self, part: Path) -> None:
        self._lock: int | None = None
        with suppress(OSError):  # a cache that can only be read, or a file system without locks
            self._lock = _opened(part)
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def keep(part: Path) -> None:
    """Hold a part until `taken`, or the end of this process."""
    if part not in _kept:
        _kept[part] = Held(part)


def taken(part: Path) -> Held:
    """Return what holds a part, which is the caller's from now on."""
    return _kept.pop(part, None) or Held(part)


@contextmanager
def alone(part: Path) -> Iterator[bool]:
    """Tell whether no other process holds a part; inside, one that wants it waits."""
    lock = None
    try:
        lock = _opened(part)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        if lock is not None:
            os.close(lock)


def _opened(part: Path) -> int:
    locks = part.parent.with_name(LOCKS)
    locks.mkdir(parents=True, exist_ok=True)
    return os.open(locks / f"{part.name}.use", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)


def touch(part: Path) -> None:
    """Note that a part is used now."""
    with suppress(OSError):  # a cache that can only be read
        os.utime(part / (META if part.parent.name == DATA else ABOUT))


@functools.cache
def code_version() -> str:
    """Hash the code of this package and of examples.py: any change of it invalidates the cache."""
    whole = hashlib.blake2b(digest_size=16)
    for path in [*sorted(Path(__file__).parent.rglob("*.py")), Path(examples.__file__)]:
        whole.update(path.name.encode() + hashlib.blake2b(path.read_bytes()).digest())
    return whole.hexdigest()
