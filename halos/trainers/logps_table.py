"""Log-probs of rows, found by the content of the rows, and their cache on disk: computed in parts, then whole or not there."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from halos.checkpoint import manifest
from halos.checkpoint.commit import DiskFullError, staged
from halos.errors import UserError
from halos.hashes import file_hash

log = logging.getLogger(__name__)

NAME = "reference"  # directory below cache_dir
HASH = "S16"  # numpy's type of a row's hash
ARRAYS = ("hashes", "starts", "logps")  # files of a table


@dataclass(frozen=True)
class Table:
    """The log-probs of the scored tokens of rows."""

    hashes: np.ndarray  # (rows,) S16, ascending and distinct
    starts: np.ndarray  # (rows + 1,) int64
    logps: np.ndarray  # (tokens,) float32, those of a row together; with k likeliest ids (tokens, 1 + 2 k)

    @classmethod
    def of(cls, hashes: np.ndarray, counts: np.ndarray, logps: np.ndarray) -> "Table":
        """Of distinct rows in any order: their hashes and numbers of tokens (rows,), and their log-probs end to end."""
        order, starts = np.argsort(hashes), np.cumsum(counts) - counts
        flat = [logps[starts[n] : starts[n] + counts[n]] for n in order]
        return cls(hashes[order], np.cumsum([0, *counts[order]], dtype=np.int64), np.concatenate([logps[:0], *flat]))

    def find(self, key: bytes) -> np.ndarray | None:
        """The log-probs (tokens,) of the row with this hash; None where it has none."""
        wanted = np.array(key, HASH)
        at = int(np.searchsorted(self.hashes, wanted))
        found = at < len(self.hashes) and self.hashes[at] == wanted
        return self.logps[self.starts[at] : self.starts[at + 1]] if found else None

    def in_memory(self) -> "Table":
        return Table(*(np.array(getattr(self, name)) for name in ARRAYS))

    @cached_property
    def content(self) -> str:
        """A hash of all numbers, whatever order they were computed in."""
        return _digest("", *(getattr(self, name) for name in ARRAYS))


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a table's rows while it is computed."""

    hashes: np.ndarray  # (rows,) S16
    counts: np.ndarray  # (rows,) int64
    logps: np.ndarray  # (tokens,) float32

    @classmethod
    def of(cls, hashes: np.ndarray, rows: Sequence[np.ndarray]) -> "Part":
        counts = np.array([len(row) for row in rows], np.int64)
        return cls(hashes, counts, np.concatenate(rows or [np.zeros(0, np.float32)]).astype(np.float32))


class LogpsCache:
    """The table of one set of rows below `cache_dir`, under a hash of `facts`: all that its numbers depend on.

    A part carries a hash of itself, and a table a manifest: what was truncated or edited, or is of other facts, is not read.
    """

    def __init__(self, cache_dir: Path, facts: Mapping[str, Any]) -> None:
        self.cache_dir, self.facts = cache_dir, facts
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        self.path = cache_dir / NAME / self.key
        self.parts = self.path.with_name(f"{self.key}.parts")
        self._lock = FileLock(cache_dir / "locks" / f"{NAME}-{self.key}.lock")  # never deleted

    def open(self) -> Table | None:
        """The table, mapped into memory; None where it is not there, or damaged."""
        if not self.path.is_dir():
            return None
        faults = manifest.verify(self.path, digest=partial(file_hash, cache=self.cache_dir))
        listing = manifest.read(self.path)
        if faults or not isinstance(listing, dict) or listing.get("key") != self.key:
            log.warning("%s is not used: %s", self.path, "; ".join(map(str, faults)) or "it is of another key")
            return None
        return Table(*(np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS))

    def acquire(self) -> bool:
        """Whether this process may compute the table now; False while another does."""
        Path(self._lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        self._lock.release()

    def part(self, number: int, hashes: np.ndarray) -> Part | None:
        """The part that an interrupted computation left; None where there is none of these rows."""
        try:
            with safe_open(self._part_file(number), "np") as file:
                given = (file.metadata() or {}).get("sha256")
                part = Part(file.get_tensor("hashes").view(HASH).reshape(-1), file.get_tensor("counts"), file.get_tensor("logps"))
        except (OSError, SafetensorError, ValueError):
            return None
        is_whole = given == _digest(self.key, part.hashes, part.counts, part.logps)
        return part if is_whole and np.array_equal(part.hashes, hashes) else None

    def keep(self, number: int, part: Part) -> None:
        """Write a part; readers meet the whole of it or nothing."""
        file = self._part_file(number)
        hidden = file.with_name(f".{file.name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"hashes": part.hashes.view(np.uint8).reshape(-1, 16), "counts": part.counts, "logps": part.logps}
        # not by save_file, whose error on a full disk is none of the system's
        hidden.write_bytes(save(arrays, {"sha256": _digest(self.key, part.hashes, part.counts, part.logps)}))
        os.replace(hidden, file)

    def publish(self, parts: Sequence[Part]) -> None:
        """Make the table of all parts, and remove these. Raises UserError where it cannot be written."""
        every = (np.concatenate([getattr(part, name) for part in parts]) for name in ("hashes", "counts", "logps"))
        table = Table.of(*every)
        facts = {"key": self.key, "depends_on": dict(self.facts), "rows": len(table.hashes), "tokens": len(table.logps)}
        try:
            with staged(self.path, main=True, facts=facts) as hidden:
                for name in ARRAYS:
                    np.save(hidden / f"{name}.npy", getattr(table, name), allow_pickle=False)
        except DiskFullError as error:
            raise UserError(f"{error}: free some, and start again; {self.parts} has what was computed") from error
        shutil.rmtree(self.parts, ignore_errors=True)

    def _part_file(self, number: int) -> Path:
        return self.parts / f"{number:06d}.safetensors"


def _digest(key: str, *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(key.encode())
    for array in arrays:
        digest.update(json.dumps([array.dtype.str, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
