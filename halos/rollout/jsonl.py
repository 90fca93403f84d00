"""JSON lines files that are appended to: a last line that a crash cut off is removed, and the rest is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halos import confined
from halos.confined import UnreadableError
from halos.errors import UserError
from halos.rollout.types import Row


def to_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def complete_lines(path: Path) -> Iterator[Row]:
    """The rows of a file that is being appended to. A last line without a newline was cut off by a crash: it is removed."""
    data = confined.read_bytes(path, within=path.parent, most=confined.LARGE)
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        descriptor = confined.open_to_append(path, within=path.parent)
        os.ftruncate(descriptor, len(whole))
        os.close(descriptor)
    for number, text in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            row = confined.parse_json(text.decode("utf-8"), "it")
        except (UnreadableError, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{number}: this line is not JSON; delete it, and its content is made again") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: this line is not a JSON object; delete it, and its content is made again")
        yield row
