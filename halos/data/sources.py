"""Data sources: files, directories, hub data sets and bundled data, each with a fingerprint of its content."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from halos.config.custom_formats import is_custom
from halos.config.suggest import nearest
from halos.confined import expanded
from halos.data import arithmetic, gsm8k, hub
from halos.data.adapters.table import ADAPTERS
from halos.data.columns import with_columns
from halos.data.custom_format import code_hash_of, convert_rows, own_rows
from halos.data.directories import files_below, files_of_pattern, files_of_split
from halos.data.files import is_pattern, kinds_of
from halos.data.readers.json_rows import read_jsonl, read_jsonl_after
from halos.data.readers.kinds import READERS, Reader, reader_for
from halos.data.readers.streams import CODECS, suffix_of
from halos.data.row import End, Row
from halos.data.row_filter import RowFilter
from halos.data.sampled import sampled_hash
from halos.data.split import Split, splits_of
from halos.errors import UserError
from halos.examples import Demonstration, Example

BUILT_IN = "arithmetic"
_NAME = re.compile(r"[\w.-]+")
FORMATS = ("gsm8k", *ADAPTERS, *READERS)


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of data.train or data.eval."""

    path: str
    split: str = ""
    weight: float | None = None  # of the examples, in proportion to other entries' (data.weights)
    revision: str | None = None
    format: str | None = None
    reader: str | None = None  # a function of the user's, from a path to rows
    columns: Mapping[str, str | None] = field(default_factory=dict)  # name -> that in the file; None leaves the column out
    filter: str | None = None  # a condition on a row's columns, as in the file
    schemas: bool = True  # whether other columns than those of the built-in forms are recognised
    count: int | None = None  # examples of it in an epoch
    epochs: float | None = None  # passes over it in an epoch: 0.5 is half of its examples
    name: str | None = None  # in the header and in metrics; else it is made of the path
    stream: bool = False  # data.stream: its files are not read whole before training

    @classmethod
    def of(cls, entry: str | Mapping[str, Any]) -> "Source":
        """Raises UserError for keys and values that no source has."""
        settings = {"path": entry} if isinstance(entry, str) else entry
        names = [f.name for f in fields(cls)]
        if not isinstance(settings, Mapping):
            raise UserError(f"data entry {entry!r}: give a path, a name, or {{{', '.join(names)}}}")
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
        self._check_amount()
        if self.name is not None and (not isinstance(self.name, str) or not _NAME.fullmatch(self.name)):
            raise UserError(f"data entry {self.path}: name={self.name!r} must be letters, digits, -, _ and dots, such as math")
        if self.format not in (None, *FORMATS) and not is_custom(self.format):
            raise UserError(
                f"data entry {self.path}: format={self.format!r} must be one of {', '.join(FORMATS)}; or a function of yours from"
                " a row to an example, format: mypackage.rows with plugins=[mypackage]"
            )
        splits_of(self.split)
        self._check_reader()
        if not isinstance(self.columns, Mapping) or not all(
            isinstance(new, str) and isinstance(old, str | None) for new, old in self.columns.items()
        ):
            raise UserError(f"data entry {self.path}: columns={self.columns!r} must be names, {{prompt: question, chosen: best}}")
        if not isinstance(self.schemas, bool):
            raise UserError(f"data entry {self.path}: schemas={self.schemas!r} must be true or false")
        if self.filter is not None:
            if not isinstance(self.filter, str):
                raise UserError(f"data entry {self.path}: filter={self.filter!r} must be text, such as 'score >= 2'")
            try:
                RowFilter(self.filter)
            except UserError as error:
                raise UserError(f"data entry {self.path}: {error}") from error

    def _check_amount(self) -> None:
        given = {"weight": self.weight, "count": self.count, "epochs": self.epochs}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            kinds, kind = (int, "whole number") if name == "count" else (int | float, "number")
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
                raise UserError(f"data entry {self.path}: {name}={value!r} must be a {kind} above 0")
        if len(given) > 1:
            listed = " and ".join(f"{name}={value:g}" for name, value in given.items())
            raise UserError(f"data entry {self.path}: {listed} each say how much of it is in an epoch: give one of them")

    def _check_reader(self) -> None:
        if self.reader is None:
            return
        if not is_custom(self.reader):
            raise UserError(
                f"data entry {self.path}: reader={self.reader!r} must name a function of yours from a path to rows, reader:"
                " mypackage.read with plugins=[mypackage]"
            )
        if self.format is not None and not is_custom(self.format):
            raise UserError(f"data entry {self.path}: reader reads the rows, so format={self.format} has no effect: leave it out")

    @property
    def kind(self) -> str | None:
        """The kind of its files, where the format names one."""
        return self.format if self.format in READERS else None


After = Callable[[End], Iterator[Row]]  # the rows of a stream after one that ends there, without reading those before it


@dataclass(frozen=True, slots=True)
class OpenSource:
    """An existing source: its rows, and a fingerprint that changes when they do."""

    source: Source
    fingerprint: str
    rows: Callable[[], Iterator[Row]]
    files: str = ""  # how many of each kind, where there are several kinds
    may_be_empty: bool = False  # of rows that are held out
    after: "After | None" = None  # None: rows can only be counted


@dataclass(frozen=True, slots=True)
class Content:
    """What a source holds, before code and settings of the user change it."""

    fingerprint: str
    rows: Callable[[], Iterator[Row]]
    files: Sequence[Path] = ()
    after: After | None = None


def open_source(source: Source, kind: type[Example], purpose: str) -> OpenSource:
    """Open `source`. `kind` is the example type that the loss takes; `purpose` (train or eval) is the split where it names none.

    Raises UserError where it does not exist; reading the rows raises it where there are none.
    """
    content = _content(source, kind, purpose)
    custom = source.format if is_custom(source.format) else None
    adapter, goes_on = ADAPTERS.get(str(source.format)), content.after
    codes = [code_hash_of(target) for target in (source.reader, custom) if target is not None]

    def converted(read: Iterator[Row]) -> Iterator[Row]:
        read = read if custom is None else convert_rows(custom, read)
        return read if source.schemas else (row._replace(schemas=False) for row in read)

    def shaped(read: Callable[[], Iterator[Row]], *, checked: bool = True) -> Iterator[Row]:
        return with_columns(read(), source.columns, source.filter, source.path, checked=checked)

    def rows() -> Iterator[Row]:
        whole = partial(shaped, content.rows)
        read = converted(whole() if adapter is None else adapter(whole, purpose))
        first = next(read, None)
        if first is None:
            raise UserError(f"{source.path}: no rows{f' in {source.split}' if source.split else ''}")
        return chain([first], read)

    def after(end: End) -> Iterator[Row]:
        assert goes_on is not None
        return converted(shaped(partial(goes_on, end), checked=False))

    return OpenSource(source, " ".join([content.fingerprint, *codes]), rows, kinds_of(content.files),
                      after=None if adapter is not None or goes_on is None else after)  # fmt: skip


def content_hash(entry: str | Mapping[str, Any], purpose: str) -> str:
    """Hash the rows of an entry of data.train or data.eval, independent of the loss that reads them, and of code and settings."""
    source = Source.of(entry)
    source = replace(source, format=None) if is_custom(source.format) else source
    if source.format == "gsm8k":
        return hash_files(sorted(expanded(source.path).glob("*.jsonl")))
    return _content(source, Demonstration, purpose).fingerprint


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


def _content(source: Source, kind: type[Example], purpose: str) -> Content:
    """Open each of the splits of a source, one after another."""
    parts = [(split, _open_split(source, split.name, kind, purpose)) for split in splits_of(source.split)]

    def rows() -> Iterator[Row]:
        return chain.from_iterable(split.select(part.rows) for split, part in parts)

    after = parts[0][1].after if len(parts) == 1 and parts[0][0] == Split(parts[0][0].name) else None
    files = [file for _, part in parts for file in part.files]
    return Content(" ".join(part.fingerprint for _, part in parts), rows, files, after)


def _open_split(source: Source, split: str, kind: type[Example], purpose: str) -> Content:
    path = expanded(source.path)
    if source.revision and (source.path == BUILT_IN or path.exists()):
        raise UserError(f"data entry {source.path}: revision={source.revision!r} applies to data sets of the hub only")
    if source.path == BUILT_IN:
        return _built_in(split or purpose)
    if path.exists():
        return _local(path, source, split, kind, purpose)
    if is_pattern(str(path)):
        files = files_of_pattern(str(path), split, any_kind=(source.kind or source.reader) is not None)
        return _of_files(source, files)
    hint = hub.misspelled(source.path, [BUILT_IN])
    hub.refuse_local(source.path, hint, is_file=source.kind is not None or source.reader is not None)
    if (file := hub.hub_file(source.path, source.revision)) is not None:
        return _local(file, source, split, kind, purpose)
    of_hub = hub.stream_of_hub if source.stream else hub.rows_of_hub
    return Content(*of_hub(source.path, split, source.revision, purpose, hint))


def _built_in(split: str) -> Content:
    if split not in ("train", "eval"):
        raise UserError(f"arithmetic: no split '{split}'; it has train and eval")

    def rows() -> Iterator[Row]:
        return (Row(record, f"arithmetic[{split}]:{n}") for n, record in enumerate(arithmetic.rows(split), 1))

    return Content(f"{split} {hash_files([Path(arithmetic.__file__)])}", rows)


def _local(path: Path, source: Source, split: str, kind: type[Example], purpose: str) -> Content:
    if source.format == "gsm8k":
        file = gsm8k.file_for(path, kind)
        return Content(f"{split or purpose} {hash_files([file])}", lambda: gsm8k.rows(file, kind, split or purpose))
    if path.is_dir() and source.reader is None:
        return _of_files(source, files_of_split(path, split, purpose))
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path}: is empty")
    read = _reader(source, path)
    if source.stream and not split and path.is_file():
        return _of_files(source, [path])
    hashed = _hash(source, files_below(path) if path.is_dir() else [path])
    return Content(f"{split} {hashed}", lambda: _rows_of_split(read(path), split, path) if split else read(path))


def _of_files(source: Source, files: Sequence[Path]) -> Content:
    """Return the rows of files, one after another."""

    def after(end: End) -> Iterator[Row]:
        ends = [end, *(End(number, 0, 0) for number in range(end.file + 1, len(files)))]
        return chain.from_iterable(read_jsonl_after(files[each.file], each) for each in ends)

    if source.stream and all(_is_lines(source, file) for file in files):
        return Content(_hash(source, files), lambda: after(End(0, 0, 0)), files, after)
    return Content(_hash(source, files), lambda: chain.from_iterable(_reader(source, file)(file) for file in files), files)


def _is_lines(source: Source, file: Path) -> bool:
    """Return whether a file can be read from any line of it on."""
    return suffix_of(file) not in CODECS and _reader(source, file) is read_jsonl


def _hash(source: Source, files: Sequence[Path]) -> str:
    return sampled_hash(files) if source.stream else hash_files(files)


def _reader(source: Source, file: Path) -> Reader:
    return reader_for(file, source.kind) if source.reader is None else partial(own_rows, source.reader)


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
