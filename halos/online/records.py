"""The files between stages: prompts, samples and feedback as JSON lines, written whole or not at all, and gone on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from halos import confined, seals
from halos.confined import UnreadableError, write_whole
from halos.errors import UserError
from halos.rollout.lines import line, whole_lines
from halos.rollout.ranks import Ranks
from halos.rollout.types import Key, Rollout, Row, Sample

Item = TypeVar("Item", Sample, Rollout)


def read(path: Path) -> list[Row]:
    """Rows of a .jsonl file, or of a .json file that holds a list. Raises UserError with file and line for what is neither."""
    text = confined.read_text(path, most=confined.LARGE)
    if path.suffix == ".json":
        rows = confined.parse_json(text, str(path))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} holds no list of rows")
        return rows
    rows = []
    for number, text_line in enumerate(text.split("\n"), 1):
        if not text_line.strip():
            continue
        row = confined.parse_json(text_line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: a row is an object with named columns")
        rows.append(row)
    return rows


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """All rows, or no file; a .json file holds them as a list, as HALOs' do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _text(path, rows))


def _text(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    if path.suffix == ".json":
        return json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n"
    return "".join(line(row) for row in rows)


def write_sealed(path: Path, rows: Sequence[Mapping[str, Any]], request: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """All rows, or no file; beside it what was asked for, the file's hash, and what was counted."""
    text = _text(path, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(meta_path(path), json.dumps({"request": request, seals.OF_ROWS: seals.digest(text), **facts}, indent=1) + "\n")
    write_whole(path, text)


def meta_path(path: Path) -> Path:
    """What a stage was asked for, and what it counted."""
    return path.with_name(f"{path.stem}.meta.json")


def read_meta(path: Path) -> Row:
    """Nothing where there is none, or none that can be read."""
    try:
        return confined.load_object(meta_path(path))
    except UnreadableError:
        return {}


class Ledger:
    """A file of rows that is being made, by one process or several, and gone on with after any death.

    Rows are appended to files of `<name>.partial/`, one for each process; lines that a crash has cut are forgotten. When all
    are there, `finish` writes the file itself, in the order that was asked for, and beside it `<name>.meta.json`. What was
    asked for is written first: rows of another request are never taken for these.
    """

    def __init__(self, path: Path, request: Mapping[str, Any], *, rank: int = 0) -> None:
        self.path, self.request, self.rank = path, json.loads(json.dumps(request)), rank
        self.partial = path.with_name(f"{path.name}.partial")
        self.rows: dict[Hashable, Row] = {}

    def is_done(self) -> bool:
        """Whether the file is there, of this very request. Raises UserError where it is another's."""
        if not self.path.is_file():
            return False
        if (asked := read_meta(self.path).get("request")) != self.request:
            raise UserError(f"{self.path} is there already, and {_difference(asked, self.request)}: delete it, or name another")
        return True

    def open(self) -> None:
        """Take up what earlier processes have left. Raises UserError where that was of another request."""
        asked = self.partial / "request.json"
        if self.partial.is_dir() and asked.is_file():
            try:
                there = confined.load_json(asked, within=self.partial.parent)
            except UnreadableError as error:
                raise UserError(f"{asked} cannot be read: delete {self.partial}, and its rows are made anew") from error
            if there != self.request:
                raise UserError(f"{self.partial} was begun already, and {_difference(there, self.request)}: delete it")
        elif self.rank == 0:
            self.partial.mkdir(parents=True, exist_ok=True)
            write_whole(asked, json.dumps(self.request, indent=1))
        for file in sorted(self.partial.glob("rows.*.jsonl")) if self.partial.is_dir() else ():
            for row in whole_lines(file):
                key = row.get("key")
                parts = key if isinstance(key, list) else [key]
                if not isinstance(row.get("row"), dict) or not all(isinstance(part, (str, int)) for part in parts):
                    raise UserError(f"{file} holds a line that is no row: delete {self.partial}, and its rows are made anew")
                self.rows.setdefault(tuple(key) if isinstance(key, list) else key, row["row"])

    def add(self, rows: Mapping[Any, Row]) -> None:
        """Keep some rows; they are on the disk when this returns."""
        self.partial.mkdir(parents=True, exist_ok=True)
        text = "".join(line({"key": key, "row": row}) for key, row in rows.items())
        confined.append(self.partial / f"rows.{self.rank}.jsonl", text, within=self.partial.parent, sync=True)
        self.rows.update(rows)

    def finish(self, keys: Sequence[Hashable], facts: Mapping[str, Any]) -> None:
        """The file, of the rows of `keys` in their order; then what it was made from goes."""
        write_sealed(self.path, [self.rows[key] for key in keys], self.request, facts)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


def open_for_all(ledger: Ledger, ranks: Ranks) -> None:
    """The first process begins a ledger, or takes one up, before the others look at it."""
    if ranks.main:
        ledger.open()
    ranks.wait()
    if not ranks.main:
        ledger.open()


class Kept(Generic[Item]):
    """A ledger of samples or rollouts, as the step that collects them keeps what it has."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def has(self, key: Key) -> bool:
        return key in self.ledger.rows

    def keep(self, items: Sequence[Item]) -> None:
        if items:
            self.ledger.add({item.key: item.to_row() for item in items})


def _difference(there: Any, asked: Mapping[str, Any]) -> str:
    """The first thing in which two requests differ."""
    if not isinstance(there, Mapping):
        return "it does not say what it was made from"
    name = next(name for name in [*asked, *there] if there.get(name) != asked.get(name))
    return f"its {name} was {str(there.get(name))[:200]}, not {str(asked.get(name))[:200]}"
