"""Data sources: files, directories, hub data sets and bundled data, each with a fingerprint of its content."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from halos.config.custom_formats import is_custom
from halos.config.suggest import nearest
from halos.confined import expanded
from halos.data import arithmetic, gsm8k
from halos.data.custom_format import code_hash_of, convert_rows
from halos.data.files import READERS, SPLITS, Row, files_by_split, reader_for
from halos.errors import UserError, user_errors
from halos.types import Demonstration, Example

BUILT_IN = "arithmetic"
FORMATS = ("gsm8k", *READERS)
_SPLIT = re.compile(r"(?P<name>[\w.-]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Split:
    """A selection of rows of a source: `train`, `train[:200]`, `[:10%]`."""

    name: str
    start: str | None = None
    stop: str | None = None

    @classmethod
    def of(cls, text: Any) -> "Split":
        match = _SPLIT.fullmatch(text) if isinstance(text, str) else None
        if not match:
            raise UserError(f"data entry: split={text!r} is not understood; write a name, a slice or both: train[:200], [:10%]")
        return cls(match["name"], match["start"], match["stop"])

    def select(self, rows: Iterator[Row]) -> Iterator[Row]:
        bounds = [bound for bound in (self.start, self.stop) if bound is not None]
        if all(bound.isdecimal() for bound in bounds):  # else how many there are must be known
            return islice(rows, *(int(bound) if bound else None for bound in (self.start, self.stop)))
        all_rows = list(rows)
        return iter(all_rows[self._bound(self.start, len(all_rows)) : self._bound(self.stop, len(all_rows))])

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
    weight: float = 1.0  # of its rows per epoch: 0.5 is half of them, 2 is each twice
    revision: str | None = None
    format: str | None = None

    @classmethod
    def of(cls, entry: str | Mapping[str, Any]) -> "Source":
        """Raises UserError for keys and values that no source has."""
        settings = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(settings, Mapping):
            raise UserError(f"data entry {entry!r}: give a path, a name, or {{path, split, weight, revision, format}}")
        names = [f.name for f in fields(cls)]
        for key in settings:
            if key not in names:
                near = nearest(str(key), names)
                hint = f"did you mean '{near}'?" if near else f"it takes {', '.join(names)}"
                raise UserError(f"data entry {dict(settings)!r}: no key '{key}'; {hint}")
        values: dict[str, Any] = {"path": "", **{key: value for key, value in settings.items() if value is not None}}
        source = cls(**values)
        source._check()
        return source

    def _check(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            where = f" (for format {self.format}, set data.root to the directory that holds its files)" if self.format else ""
            raise UserError(f"data entry: path={self.path!r} is empty{where}")
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
    """An existing source: its rows, and a fingerprint that changes when they do."""

    source: Source
    fingerprint: str
    rows: Callable[[], Iterator[Row]]


def open_source(source: Source, kind: type[Example], purpose: str) -> OpenSource:
    """Open `source`. `kind` is the example type that the loss takes; `purpose` (train or eval) is the split where it names none.

    Raises UserError where it does not exist; reading the rows raises it where there are none.
    """
    split, path = Split.of(source.split), expanded(source.path)
    if source.revision and (source.path == BUILT_IN or path.exists()):
        raise UserError(f"data entry {source.path}: revision={source.revision!r} applies to data sets of the hub only")
    if source.path == BUILT_IN:
        fingerprint, read = _built_in(split.name or purpose)
    elif path.exists():
        fingerprint, read = _local(path, source, split.name, kind, purpose)
    else:
        fingerprint, read = _hub(source, split.name, purpose)

    custom = source.format if is_custom(source.format) else None

    def rows() -> Iterator[Row]:
        selected = split.select(read())
        selected = selected if custom is None else convert_rows(custom, selected)
        first = next(selected, None)
        if first is None:
            raise UserError(f"{source.path}: no rows{f' in {source.split}' if source.split else ''}")
        return chain([first], selected)

    return OpenSource(source, fingerprint if custom is None else f"{fingerprint} {code_hash_of(custom)}", rows)


def content_hash(entry: str | Mapping[str, Any], purpose: str) -> str:
    """Hash the rows of an entry of data.train or data.eval, independent of the loss that reads them."""
    source = Source.of(entry)
    source = replace(source, format=None) if is_custom(source.format) else source  # the hash is of files, not of code
    if source.format == "gsm8k":
        return hash_files(sorted(expanded(source.path).glob("*.jsonl")))
    return open_source(source, Demonstration, purpose).fingerprint


FingerprintAndRows = tuple[str, Callable[[], Iterator[Row]]]


def hash_files(paths: Sequence[Path]) -> str:
    """Return one hash over the names and bytes of files."""
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
    """Yield the rows of a file whose column `split` is `split`; rows without it are `train`."""
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
    raise UserError(f"{root}: no files of split '{wanted[0]}' (found: {has}); known names are: {', '.join(SPLITS)}")


def _default_splits(purpose: str) -> tuple[str, ...]:
    """Return the split names that serve as `train` or `eval` where an entry names none, the best first."""
    return ("eval", "validation", "valid", "val", "dev", "test") if purpose == "eval" else ("train",)


def _hub(source: Source, split: str, purpose: str) -> FingerprintAndRows:
    path, near = source.path, nearest(source.path, [BUILT_IN])
    hint = f"; did you mean '{near}'?" if near else ""
    is_file = (source.format and not is_custom(source.format)) or path.startswith(".") or _looks_local(Path(path))
    if is_file or not _HUB.fullmatch(path):
        raise UserError(f"{path}: no such file or directory{hint}")
    from datasets import Dataset, DatasetDict, load_dataset

    name, _, config = path.partition(":")
    with user_errors(f"{path}: neither a file or directory here nor an available data set of the hub", hint.removeprefix("; ")):
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
    """Return whether a name can only be a file's: asking the hub would fail, after half a minute where it is unreachable."""
    files = {*READERS, "csv", "tsv", "txt", "gz", "zip", "zst", "arrow"}
    return path.suffix.removeprefix(".").lower() in files or (len(path.parts) > 1 and path.parent.is_dir())
