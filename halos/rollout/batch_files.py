"""Files of the rollouts of live batches, RUN/rollouts/000123.jsonl.gz: written whole or not at all, equal rows as equal bytes."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from halos import confined
from halos.confined import UnreadableError
from halos.errors import UserError
from halos.rollout.jsonl import to_line
from halos.rollout.rows import Row

DIRECTORY, SUFFIX = "rollouts", ".jsonl.gz"
LEVEL = 6  # of compression: 9 takes twice as long for files that are a hundredth smaller


def files_of(run: Path) -> dict[int, Path]:
    """The files of a run by the number of their batch, in order."""
    paths = [path for path in (run / DIRECTORY).glob(f"*{SUFFIX}") if path.name.removesuffix(SUFFIX).isdecimal()]
    return {int(path.name.removesuffix(SUFFIX)): path for path in sorted(paths)}


def write(run: Path, number: int, rows: Iterable[Mapping[str, Any]]) -> Path:
    path = run / DIRECTORY / f"{number:06d}{SUFFIX}"
    confined.refuse_links(path.parent, run)
    path.parent.mkdir(exist_ok=True)
    text = "".join(map(to_line, rows))
    confined.write_whole(path, gzip.compress(text.encode(), LEVEL, mtime=0), within=run)  # without the time in the header
    return path


def read(path: Path, *, within: Path) -> Iterator[Row]:
    """The rows of a file. Raises UnreadableError for one that is damaged."""
    packed = confined.read_bytes(path, within=within, most=confined.LARGE)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            data = file.read(confined.LARGE + 1)  # what a few bytes may unpack to has no bound of its own
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableError(f"{path} cannot be unpacked: {error}") from error
    if len(data) > confined.LARGE:
        raise UnreadableError(f"{path} unpacks to more than {confined.LARGE} bytes")
    for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
        row = confined.parse_json(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: this line is not a JSON object")
        yield row
