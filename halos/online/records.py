"""The files between stages: prompts, samples and feedback as JSON lines, written completely or not at all, and resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from halos import confined, seals
from halos.confined import UnreadableError, write_whole
from halos.errors import UserError
from halos.rollout.jsonl import complete_lines, to_line
from halos.rollout.ranks import Ranks
from halos.rollout.types import TRAIN, Key, Rollout, Row, Sample

Item = TypeVar("Item", Sample, Rollout)


def read(path: Path) -> list[Row]:
    """Rows of a .jsonl file, or of a .json file that holds a list. Raises UserError, with file and line, for anything else."""
    return [row for row, _ in read_located(path)]


def read_located(path: Path) -> list[tuple[Row, str]]:
    """The same rows, each with its place for messages: file and line, or the number in the list."""
    text = confined.read_text(path, most=confined.LARGE)
    if path.suffix == ".json":
        rows = confined.parse_json(text, str(path))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} is not a list of objects")
        return [(row, f"{path}:{number}") for number, row in enumerate(rows, 1)]
    located = []
    for number, text_line in enumerate(text.split("\n"), 1):
        if not text_line.strip():
            continue
        where = f"{path}:{number}"
        row = confined.parse_json(text_line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row is an object with named columns")
        located.append((row, where))
    return located


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write all rows, or no file; a .json file holds them as a list, as HALOs' files do."""
    make_directory(path.parent)
    write_whole(path, _text(path, rows))


def _text(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    if path.suffix == ".json":
        return json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n"
    return "".join(to_line(row) for row in rows)


def write_sealed(path: Path, rows: Sequence[Mapping[str, Any]], request: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write all rows, or no file; and next to it `<name>.meta.json` with the request, the file's hash, and `facts`."""
    text = _text(path, rows)
    make_directory(path.parent)
    write_whole(meta_path(path), json.dumps({"request": request, seals.ROWS_HASH: seals.digest(text), **facts}, indent=1) + "\n")
    write_whole(path, text)


def make_directory(path: Path) -> None:
    """Create a directory for output, with those above it. Raises UserError where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be created ({error.strerror}): name a file in a directory that can be") from error


def meta_path(path: Path) -> Path:
    """The file next to a stage's output with its request, a hash, and counts."""
    return path.with_name(f"{path.stem}.meta.json")


def read_meta(path: Path) -> Row:
    """The content of `<name>.meta.json`; empty where it is missing or unreadable."""
    try:
        return confined.load_object(meta_path(path))
    except UnreadableError:
        return {}


def num_drawn(rounds: Sequence[Path]) -> int:
    """Return how many prompts the rounds in these directories have drawn. Older rounds did not record it: each drew as many as
    the largest of them has, since what a round drew twice it has once."""
    if not rounds:
        return 0
    files = [each / "prompts.jsonl" for each in rounds]
    drawn = read_meta(files[-1]).get("drawn")
    if isinstance(drawn, int):
        return drawn
    return len(rounds) * max(sum(row.get("split") == TRAIN for row in read(path)) for path in files)


class ResumableFile:
    """A file of rows written by one rank or several, which can be resumed after a crash.

    Rows are appended to files in `<name>.partial/`, one per rank; lines that a crash cut off are dropped. With all rows there,
    `finish` writes the file itself, in the requested order, and next to it `<name>.meta.json`. The request is written first, so
    that rows of another request are never mixed in. What older versions did not record, `recorded_since` of its entries, is not
    compared with a file that lacks it.
    """

    def __init__(
        self, path: Path, request: Mapping[str, Any], *, rank: int = 0, recorded_since: Collection[str] = ()
    ) -> None:  # fmt: skip
        self.path, self.request, self.rank = path, json.loads(json.dumps(request)), rank
        self.recorded_since = recorded_since
        self.partial = path.with_name(f"{path.name}.partial")
        self.rows: dict[Hashable, Row] = {}

    def is_done(self) -> bool:
        """Whether the file exists for this request. Raises UserError where it is of another request."""
        if not self.path.is_file():
            return False
        if (recorded := self._comparable(read_meta(self.path).get("request"))) != self.request:
            raise UserError(
                f"{self.path} exists already, and {_difference(recorded, self.request)}: delete it, or name another file"
            )
        return True

    def _comparable(self, recorded: Any) -> Any:
        """Return a recorded request with this one's values for what its version did not record."""
        if not isinstance(recorded, Mapping):
            return recorded
        return {**{name: self.request[name] for name in self.recorded_since if name in self.request}, **recorded}

    def open(self) -> None:
        """Read the rows that earlier attempts left. Raises UserError where they are of another request."""
        request = self.partial / "request.json"
        if self.partial.is_dir() and request.is_file():
            try:
                recorded = confined.load_json(request, within=self.partial.parent)
            except UnreadableError as error:
                raise UserError(f"{request} cannot be read: delete {self.partial}, and its rows are made again") from error
            if (recorded := self._comparable(recorded)) != self.request:
                raise UserError(f"{self.partial} was begun already, and {_difference(recorded, self.request)}: delete it")
        elif self.rank == 0:
            make_directory(self.partial)
            write_whole(request, json.dumps(self.request, indent=1))
        for file in sorted(self.partial.glob("rows.*.jsonl")) if self.partial.is_dir() else ():
            for row in complete_lines(file):
                key = row.get("key")
                parts = key if isinstance(key, list) else [key]
                if not isinstance(row.get("row"), dict) or not all(isinstance(part, (str, int)) for part in parts):
                    raise UserError(f"{file} holds a line that is no row: delete {self.partial}, and its rows are made again")
                self.rows.setdefault(tuple(key) if isinstance(key, list) else key, row["row"])

    def add(self, rows: Mapping[Any, Row]) -> None:
        """Append rows; they are on disk when this returns."""
        make_directory(self.partial)
        text = "".join(to_line({"key": key, "row": row}) for key, row in rows.items())
        confined.append(self.partial / f"rows.{self.rank}.jsonl", text, within=self.partial.parent, sync=True)
        self.rows.update(rows)

    def finish(self, keys: Sequence[Hashable], facts: Mapping[str, Any]) -> None:
        """Write the file from the rows of `keys`, in their order; then delete the partial files."""
        write_sealed(self.path, [self.rows[key] for key in keys], self.request, facts)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


def open_on_all_ranks(file: ResumableFile, ranks: Ranks) -> None:
    """Open on rank 0, which may create the partial files, before the others. No rank goes on before all have read, so that none
    reads the rows that another is adding, and all agree on those that are missing."""
    if ranks.main:
        file.open()
    ranks.barrier()
    if not ranks.main:
        file.open()
    ranks.barrier()


class FileStore(Generic[Item]):
    """A resumable file as the store of samples or rollouts while they are collected."""

    def __init__(self, file: ResumableFile) -> None:
        self.file = file

    def has(self, key: Key) -> bool:
        return key in self.file.rows

    def keep(self, items: Sequence[Item]) -> None:
        if items:
            self.file.add({item.key: item.to_row() for item in items})


def _difference(recorded: Any, request: Mapping[str, Any]) -> str:
    """The first entry in which two requests differ, in words."""
    if not isinstance(recorded, Mapping):
        return "it does not say what it was made from"
    name = next(name for name in [*request, *recorded] if recorded.get(name) != request.get(name))
    return f"its {name} was {str(recorded.get(name))[:200]}, not {str(request.get(name))[:200]}"
