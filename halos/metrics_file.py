"""metrics.jsonl: one line per logged step or evaluation, read so that a damaged line loses only itself."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos import confined
from halos.confined import UnreadableError

DAMAGED = "metrics.damaged.jsonl"  # next to metrics.jsonl: lines that could not be read, verbatim
LAST = 2**53  # the first integer beyond which float64 cannot count in steps of 1


class MetricsFile:
    """The metrics.jsonl of one run. Creating the object touches no file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one line: all of it, or nothing where the disk is full. `row` has a `step`."""
        assert "step" in row
        confined.append(self.path, to_json(row) + "\n", within=self.path.parent)

    def read(self) -> list[dict[str, Any]]:
        """All rows that can be parsed."""
        return self._parsed()[0]

    def damaged(self) -> list[bytes]:
        """Lines that cannot be parsed. A last line without a newline is not counted: a crash cut it off."""
        return self._parsed()[1]

    def keep_until(self, step: int) -> int:
        """Drop what was logged after `step`, so that no step appears twice when a run resumes from there. Damaged lines move to
        `DAMAGED`; returns how many."""
        rows, damaged = self._parsed()
        if damaged:
            confined.append(
                self.path.with_name(DAMAGED),
                "".join(f"{line.decode('utf-8', errors='backslashreplace')}\n" for line in damaged),
                within=self.path.parent,
            )
        text = "".join(to_json(row) + "\n" for row in rows if row["step"] <= step)
        confined.write_whole(self.path, text, within=self.path.parent)
        return len(damaged)

    def digest(self, rows: int) -> tuple[int, str]:
        """The hash of the first `rows` lines, and how many of them there are."""
        lines = self._bytes().split(b"\n")[:-1][:rows]
        return len(lines), hashlib.sha256(b"\n".join(lines)).hexdigest()

    def seal(self, step: int) -> dict[str, Any]:
        """For a checkpoint of `step`: how many lines precede it, and their hash. Lines of later steps may be there already."""
        lines = self._bytes().split(b"\n")[:-1]
        later = (number for number, line in enumerate(lines) if (row := row_of(line)) is not None and row["step"] > step)
        rows, digest = self.digest(next(later, len(lines)))
        return {"rows": rows, "sha256": digest}

    def _bytes(self) -> bytes:
        if not os.path.lexists(self.path):
            return b""
        return confined.read_bytes(self.path, within=self.path.parent, most=confined.LARGE)

    def _parsed(self) -> tuple[list[dict[str, Any]], list[bytes]]:
        rows, damaged = [], []
        for line in self._bytes().split(b"\n")[:-1]:
            row = row_of(line)
            if row is not None:
                rows.append(row)
            elif line.strip():
                damaged.append(line)
        return rows, damaged


def row_of(line: bytes) -> dict[str, Any] | None:
    """Parse a line that `append` wrote: an int `step`, a string `split`, numbers otherwise. None where it is not one."""
    try:
        row = confined.parse_json(line.decode("utf-8"), "a line")
    except (UnreadableError, UnicodeDecodeError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not -1 <= row["step"] < LAST:
        return None
    return row if all(isinstance(value, str) if name == "split" else _is_number(value) for name, value in row.items()) else None


def _is_number(value: Any) -> bool:
    """A number, null, or a list of these."""
    return all(map(_is_number, value)) if isinstance(value, list) else value is None or isinstance(value, (int, float))


def to_json(value: Any) -> str:
    """As JSON, which has no nan and no infinity: null stands for them."""
    return json.dumps(finite(value), allow_nan=False, ensure_ascii=False)


def finite(value: Any) -> Any:
    """`value` with None for every nan and infinity in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value
