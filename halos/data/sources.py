"""Where rows come from: files, directories, hub data sets and what is built in, each with a fingerprint of its content."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from halos.config.custom_formats import is_custom
from halos.config.suggest import nearest
from halos.confined import expanded
from halos.data import arithmetic, gsm8k
from halos.data.custom_format import code_hash_of, convert_rows
from halos.data.files import READERS, SPLITS, Row, files_by_split, reader_for
from halos.errors import UserError, doing
from halos.types import Demonstration, Example

BUILT_IN = "arithmetic"
FORMATS = ("gsm8k", *READERS)
_SPLIT = re.compile(r"(?P<name>[\w.-]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Split:
    """`train`, `train[:200]`, `[:10%]`: which rows of a source are meant."""

    name: str
    start: str | None = None
    stop: str | None = None

    @classmethod
    def of(cls, text: Any) -> "Split":
        found = _SPLIT.fullmatch(text) if isinstance(text, str) else None
        if not found:
            raise UserError(f"data entry: split={text!r} is not understood; write a name, a slice or both: train[:200], [:10%]")
        return cls(found["name"], found["start"], found["stop"])

    def cut(self, rows: Iterator[Row]) -> Iterator[Row]:
        if self.start is None and self.stop is None:
            return rows
        everything = list(rows)
        return iter(everything[self._bound(self.start, len(everything)) : self._bound(self.stop, len(everything))])

    @staticmethod
    def _bound(text: str | None, count: int) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of data.train or data.eval."""

    path: str
    split: str = ""
    weight: float = 1.0  # how often its rows come in an epoch: 0.5 half of them, 2 each twice
    revision: str | None = None
    format: str | None = None

    @classmethod
    def of(cls, entry: str | Mapping[str, Any]) -> "Source":
        """Raises UserError for keys and values that no source has."""
        given = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(given, Mapping):
            raise UserError(f"data entry {entry!r}: give a path, a name, or {{path, split, weight, revision, format}}")
        names = [f.name for f in fields(cls)]
        for key in given:
            if key not in names:
                near = nearest(str(key), names)
                hint = f"did you mean '{near}'?" if near else f"it takes {', '.join(names)}"
                raise UserError(f"data entry {dict(given)!r}: no key '{key}'; {hint}")
        values: dict[str, Any] = {"path": "", **{key: value for key, value in given.items() if value is not None}}
        source = cls(**values)
        source._check()
        return source

    def _check(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            where = f" (for format {self.format}, set data.root to the directory that holds its files)" if self.format else ""
            raise UserError(f"data entry: path={self.path!r} names nothing{where}")
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not 0 < self.weight < float("inf"):
            raise UserError(f"data entry {self.path}: weight={self.weight!r} must be a number above 0")
        if self.format not in (None, *FORMATS) and not is_custom(self.format):
            raise UserError(
                f"data entry {self.path}: format={self.format!r} must be one of {', '.join(FORMATS)}; or a function of yours from"
                " a row to an example, format: mypackage.rows with plugins=[mypackage]"
            )
        Split.of(self.split)


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A source that exists: its rows, and a fingerprint that changes when they do."""

    source: Source
    fingerprint: str
    rows: Callable[[], Iterator[Row]]


def open_source(source: Source, kind: type[Example], purpose: str) -> OpenSource:
    """Find what `source` names. `kind` is what the loss eats; `purpose` (train or eval) is the split where none is named.

    Raises UserError where nothing is found; reading the rows raises it where there are none.
    """
    split, path = Split.of(source.split), expanded(source.path)
    if source.revision and (source.path == BUILT_IN or path.exists()):
        raise UserError(f"data entry {source.path}: revision={source.revision!r} is for data sets of the hub")
    if source.path == BUILT_IN:
        opened = _built_in(split.name or purpose)
    elif path.exists():
        opened = _local(path, source, split.name, kind, purpose)
    else:
        opened = _hub(source, split.name, purpose)

    own = source.format if is_custom(source.format) else None

    def rows() -> Iterator[Row]:
        wanted = split.cut(opened[1]())
        wanted = wanted if own is None else convert_rows(own, wanted)
        first = next(wanted, None)
        if first is None:
            raise UserError(f"{source.path}: no rows{f' in {source.split}' if source.split else ''}")
        return chain([first], wanted)

    return OpenSource(source, opened[0] if own is None else f"{opened[0]} {code_hash_of(own)}", rows)


def content_hash(entry: str | Mapping[str, Any], purpose: str) -> str:
    """A hash that changes with the rows that an entry of data.train or data.eval names, whatever loss reads them."""
    source = Source.of(entry)
    source = replace(source, format=None) if is_custom(source.format) else source  # whose code is no part of a file
    if source.format == "gsm8k":
        return hash_files(sorted(expanded(source.path).glob("*.jsonl")))
    return open_source(source, Demonstration, purpose).fingerprint


FingerprintAndRows = tuple[str, Callable[[], Iterator[Row]]]  # fingerprint, rows


def hash_files(paths: Sequence[Path]) -> str:
    """One hash over names and bytes."""
    total = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return total.hexdigest()


def _built_in(split: str) -> FingerprintAndRows:
    if split not in ("train", "eval"):
        raise UserError(f"arithmetic: no split '{split}'; it has train and eval")

    def rows() -> Iterator[Row]:
        return (Row(record, f"arithmetic[{split}]:{n}") for n, record in enumerate(arithmetic.rows(split), 1))

    return f"{split} {hash_files([Path(arithmetic.__file__)])}", rows


def _local(path: Path, source: Source, split: str, kind: type[Example], purpose: str) -> FingerprintAndRows:
    if source.format == "gsm8k":
        file = gsm8k.file_for(path, kind)
        return f"{split or purpose} {hash_files([file])}", lambda: gsm8k.rows(file, kind, split or purpose)
    named = None if is_custom(source.format) else source.format
    if path.is_dir():
        files = _files_of_split(path, split, purpose)
        return hash_files(files), lambda: chain.from_iterable(reader_for(file, named)(file) for file in files)
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty")
    read = reader_for(path, named)
    return f"{split} {hash_files([path])}", lambda: _rows_of_split(read(path), split, path) if split else read(path)


def _rows_of_split(rows: Iterator[Row], split: str, path: Path) -> Iterator[Row]:
    """The rows of one file that its column `split` marks as `split`; a file without the column is all `train`."""
    seen: set[str] = set()
    for row in rows:
        mark = str(row.record.get("split") or "train")
        seen.add(mark)
        if mark == split:
            yield row
    if split not in seen:
        marks = ", ".join(sorted(seen))
        raise UserError(f"{path}: no row of split '{split}' (its rows are: {marks}); a slice of a file is written [:200]")


def _files_of_split(root: Path, split: str, purpose: str) -> list[Path]:
    splits = files_by_split(root)
    if not split and splits.keys() == {""}:
        return splits[""]
    wanted = (split.lower(),) if split else _default_splits(purpose)
    for name in wanted:
        if name in splits:
            return splits[name]
        if len(longer := [other for other in splits if re.match(rf"{re.escape(name)}[-_.]", other)]) > 1:
            raise UserError(f"{root}: which of {', '.join(longer)}? Write {{path: {root}, split: {longer[0]}}}, or name each")
        if longer:
            return splits[longer[0]]
    has = ", ".join(name or "files of no split" for name in splits)
    raise UserError(f"{root}: no files of split '{wanted[0]}' (found: {has}); names that are seen: {', '.join(SPLITS)}")


def _default_splits(purpose: str) -> tuple[str, ...]:
    """The splits that may stand for `train` or `eval` where an entry names none, the best first."""
    return ("eval", "validation", "valid", "val", "dev", "test") if purpose == "eval" else ("train",)


def _hub(source: Source, split: str, purpose: str) -> FingerprintAndRows:
    path, near = source.path, nearest(source.path, [BUILT_IN])
    hint = f"; did you mean '{near}'?" if near else ""
    is_file = (source.format and not is_custom(source.format)) or path.startswith(".") or _looks_local(Path(path))
    if is_file or not _HUB.fullmatch(path):
        raise UserError(f"{path}: no such file or directory{hint}")
    from datasets import Dataset, DatasetDict, load_dataset

    name, _, config = path.partition(":")
    with doing(f"{path}: neither a file or directory here nor a data set that the hub gives", hint.removeprefix("; ")):
        loaded = load_dataset(name, config or None, split=split or None, revision=source.revision)
    if isinstance(loaded, DatasetDict):
        has = [str(name) for name in loaded]
        split = next((name for name in _default_splits(purpose) if name in has), "")
        if not split:
            raise UserError(f"{path}: which split? It has {', '.join(has)}; write {{path: {path}, split: ...}}")
        loaded = loaded[split]
    assert isinstance(loaded, Dataset)
    table = loaded

    def rows() -> Iterator[Row]:
        return (Row(dict(record), f"{path}[{split}]:{n}") for n, record in enumerate(table, 1))

    return table._fingerprint, rows


def _looks_local(path: Path) -> bool:
    """A name that is no data set's: the hub would be asked for it in vain, half a minute long where it cannot be reached."""
    files = {*READERS, "csv", "tsv", "txt", "gz", "zip", "zst", "arrow"}
    return path.suffix.removeprefix(".").lower() in files or (len(path.parts) > 1 and path.parent.is_dir())
