"""The list of all that the cache of tokenised rows holds: data sets of runs, and shards of sources, with size and last use."""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halos import confined
from halos.data.cache import ABOUT, DATA, META, SHARDS, STREAMS, code_version
from halos.errors import UserError

HIDDEN = re.compile(r"\.([0-9a-f]+)-[0-9a-f]{8}")  # a part that is being written or removed


@dataclass(frozen=True, slots=True)
class Stored:
    """One directory of the cache."""

    path: Path
    part: Path  # which runs hold: `path`, or what a leftover was to be, or was to be in
    sources: tuple[str, ...]
    rows: int  # examples that are kept
    tokens: int | None  # of prompts and completions; None where an earlier version wrote it
    size: int  # bytes
    used: float  # seconds since 1970
    unusable: str = ""  # why no run of this version can use it
    made: Mapping[str, Any] = field(default_factory=dict)  # tokenizer, template and other settings

    @property
    def kind(self) -> str:
        return {SHARDS: "source", STREAMS: "stream"}.get(self.part.parent.name, "data set")

    @property
    def key(self) -> str:
        return self.part.name


def stored(cache: Path) -> list[Stored]:
    """Return everything in the cache, the last used first. Raises UserError where there is no such directory."""
    if not cache.is_dir():
        raise UserError(f"{cache}: there is no such directory; --cache-dir names another")
    found = list[Stored]()
    for name, read in ((DATA, _data_set), (SHARDS, _source), (STREAMS, _source)):
        for path in _below(cache / name):
            if match := HIDDEN.fullmatch(path.name):
                found.append(_leftover(path, path.with_name(match[1])))
                continue
            found += [read(path), *(_leftover(inner, path) for inner in _below(path) if HIDDEN.fullmatch(inner.name))]
    return sorted(found, key=lambda each: -each.used)


def _below(directory: Path) -> Iterator[Path]:
    if directory.is_dir():
        yield from (path for path in sorted(directory.iterdir()) if path.is_dir() and not path.is_symlink())


def _leftover(path: Path, part: Path) -> Stored:
    size, changed = _measured(path)
    return Stored(path, part, (), 0, None, size, changed, "unfinished")


def _data_set(path: Path) -> Stored:
    size, changed = _measured(path)
    try:
        meta = confined.load_object(path / META)
        report, made = meta["report"], meta.get("made") or {}
        sources, rows = tuple(str(each["name"]) for each in report), sum(int(each["kept"]) for each in report)
        used = (path / META).stat().st_mtime
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return Stored(path, path, (), 0, None, size, changed, "damaged")
    return Stored(path, path, sources, rows, meta.get("tokens"), size, used, _outdated(made), made)


def _source(path: Path) -> Stored:
    size, changed = _measured(path)
    try:
        about = confined.load_object(path / ABOUT)
        used, made = (path / ABOUT).stat().st_mtime, about["made"]
        sources = (str(about["source"]),)
    except (UserError, OSError, KeyError, TypeError):
        return Stored(path, path, (), 0, None, size, changed, "damaged, or made by another version")
    rows, tokens = 0, 0
    for shard in (each for each in _below(path) if not HIDDEN.fullmatch(each.name)):
        try:
            meta = confined.load_object(shard / META)
            rows += sum(int(each["kept"]) for each in meta["report"])
            tokens += int(meta["tokens"])
        except (UserError, OSError, KeyError, TypeError, ValueError):
            continue  # it is made again when the source is used
    return Stored(path, path, sources, rows, tokens, size, max(used, changed), _outdated(made), made)


def _outdated(made: Mapping[str, Any]) -> str:
    return "" if made.get("code") == code_version() else "made by another version"


def _measured(path: Path) -> tuple[int, float]:
    """Return the bytes of all files below, without those of leftovers, and when the newest of them was changed."""
    size, changed = 0, 0.0
    for file in path.rglob("*"):
        try:
            found = file.lstat()
        except OSError:  # a run has just renamed it
            continue
        if not stat.S_ISDIR(found.st_mode) and not HIDDEN.fullmatch(file.relative_to(path).parts[0]):
            size, changed = size + found.st_size, max(changed, found.st_mtime)
    return size, changed or time.time()
