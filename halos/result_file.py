"""result.json: how far a run is, or how it ended; sealed, and written even when the disk is full."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from halos import confined, seals
from halos.confined import DISK_FULL, UnreadableError
from halos.metrics_file import to_json
from halos.redaction import redact

Status = Literal["finished", "stopped", "failed", "running"]
NAME = "result.json"
RESERVE, RESERVED = ".result.json.reserve", 2**14  # bytes kept for the final result, in case others fill the disk
TYPES = {"status": str, "step": int, "metrics": dict}
FIELDS = {*TYPES, "reason", "seconds"}


class ResultFile:
    """A launcher turns every exit status but 0 into 1, so the status is on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / NAME

    def write(
        self, status: Status, step: int, metrics: Mapping[str, Any], *, reason: str | None = None, seconds: float | None = None
    ) -> None:  # fmt: skip
        """Replace the file. "running" reserves room on the disk, which every other status frees. `seconds`: of the loop of this
        attempt, once all was loaded."""
        fields = {"status": status, "step": step, "metrics": metrics, **({"reason": redact(reason)} if reason else {})}
        fields |= {} if seconds is None else {"seconds": round(seconds, 2)}
        unsealed = to_json(fields)
        text = f'{unsealed[:-1]}, "seal": "{seals.digest(unsealed)}"}}\n'
        reserve = self.directory / RESERVE
        if status == "running":
            confined.write_whole(reserve, " " * RESERVED, within=self.directory)
        try:
            confined.write_whole(self.path, text, within=self.directory)
        except OSError as error:
            if error.errno not in DISK_FULL or not confined.overwrite_in_place(reserve, text):
                raise
            os.replace(reserve, self.path)
        if status != "running":
            confined.remove(reserve)

    def read(self) -> dict[str, Any] | None:
        """Return the fields without the seal; None if the file is missing, unreadable or changed."""
        try:
            result = confined.load_object(self.path, within=self.directory)
        except UnreadableError:
            return None
        if self.is_intact() is False:
            return None
        result.pop("seal", None)
        return result if all(type(result.get(name)) is kind for name, kind in TYPES.items()) else None

    def is_intact(self) -> bool | None:
        """Return whether the file is as it was written; None for one that was written before results had seals."""
        try:
            result = confined.load_object(self.path)
        except UnreadableError:
            return False
        seal = result.pop("seal", None)
        if seal is None:
            return None if result.keys() <= FIELDS else False  # another name may be that of the seal, changed
        return seals.digest(to_json(result)) == seal
