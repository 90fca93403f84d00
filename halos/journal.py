"""An append-only file of JSON lines, each with a seal: a hash over itself and all lines before it."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos import confined

SEAL = b', "seal": "'  # the last entry of a line


@dataclass(frozen=True, slots=True)
class Entries:
    """The rows before the first broken line, and what is wrong with that line."""

    rows: list[dict[str, Any]]
    fault: str | None


class Journal:
    """Creating the object touches nothing on disk. Only one process may write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a line and sync it to disk. An incomplete line left by a crash is removed first."""
        data = self._bytes()
        lines = data.split(b"\n")
        if lines[-1]:
            confined.write_whole(self.path, data[: -len(lines[-1])].decode(errors="replace"), within=self.path.parent)
        line = _sealed(json.dumps(dict(row)).encode(), _seal_of(lines[-2]) if len(lines) > 1 else b"")
        confined.append(self.path, line.decode() + "\n", within=self.path.parent, sync=True)

    def read(self) -> Entries:
        """Read the rows before the first broken seal; none if there is no file."""
        rows, before = list[dict[str, Any]](), b""
        for number, line in enumerate(self._bytes().split(b"\n")[:-1], 1):
            text = line.rpartition(SEAL)[0] + b"}"
            if _sealed(text, before) != line:
                return Entries(rows, f"line {number}: contents changed")
            rows.append(json.loads(text))
            before = _seal_of(line)
        return Entries(rows, None)

    def _bytes(self) -> bytes:
        if not os.path.lexists(self.path):
            return b""
        return confined.read_bytes(self.path, within=self.path.parent)


def _sealed(text: bytes, before: bytes) -> bytes:
    return text[:-1] + SEAL + hashlib.sha256(before + text).hexdigest().encode() + b'"}'


def _seal_of(line: bytes) -> bytes:
    return line.rpartition(SEAL)[2]
