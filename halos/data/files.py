"""Read rows of json, jsonl and parquet files, each with its line, so that messages can name it."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from halos.errors import UserError, first_line_of, user_errors
from halos.examples import Example

_NOT_BLANK = re.compile(r"[^ \t\r\n]")


class Row(NamedTuple):
    """One row of data and its position, `train.jsonl:12`."""

    record: dict[str, Any]
    where: str
    left_out: bool = False  # a custom format returned None for it
    example: Example | None = None  # of a custom format, instead of columns
    original: dict[str, Any] | None = None  # the row that a custom format converted


def _record(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row is an object with named columns, this is {_type_name(value)}")
    return Row(value, where)


def _type_name(value: Any) -> str:
    names = {"list": "a list", "str": "text", "int": "a number", "float": "a number", "bool": "true or false", "NoneType": "null"}
    return names.get(type(value).__name__, type(value).__name__)


def read_jsonl(path: Path) -> Iterator[Row]:
    """Read one object per line, skipping blank lines."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text") from error
        with _decoding(where):
            value = json.loads(text)
            if "\\ud" in text.lower():
                _refuse_lone_surrogates(value)
        yield _record(value, where)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Raise whatever Python's decoder raises as a UserError that names the row."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds a lone surrogate, half of a character, such as \\ud800") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON: lists or objects are nested too deeply") from error
    except ValueError as error:  # a number with more digits than Python reads
        raise UserError(f"{where}: not valid JSON: {first_line_of(error).partition(';')[0]}") from error


def _refuse_lone_surrogates(value: Any) -> None:
    json.dumps(value, ensure_ascii=False).encode()  # raises at a lone surrogate, which no tokenizer takes


def read_json(path: Path) -> Iterator[Row]:
    """Read a list of objects, or one object per line, which many a .json file really holds."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    start = _skip_blanks(text, 0)
    if text.startswith("[", start):
        yield from _list_elements(text, start + 1, path)
        return
    try:
        with _decoding(str(path)):
            value = json.loads(text)
    except UserError as wrapped:
        error = wrapped.__cause__
        if not isinstance(error, json.JSONDecodeError):
            raise
        if error.msg == "Extra data":
            yield from read_jsonl(path)
            return
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    if isinstance(value, dict):
        lists = [key for key, held in value.items() if isinstance(held, list) and held and isinstance(held[0], dict)]
        held = f"its key '{lists[0]}' holds one: write that list" if lists else "write a list of such objects"
        raise UserError(f"{path}: holds one object, not a list of rows; {held} to a .json file, or one row a line to a .jsonl")
    raise UserError(f"{path}: a .json file holds a list of objects, this one {_type_name(value)}")


def _skip_blanks(text: str, at: int) -> int:
    """Return the next index from `at` on that is not blank."""
    match = _NOT_BLANK.search(text, at)
    return match.start() if match else len(text)


def _list_elements(text: str, at: int, path: Path) -> Iterator[Row]:
    """Read the elements of a JSON list that starts before `at`, each with the line on which it starts."""
    decoder, line, counted, halves = json.JSONDecoder(), 1, 0, "\\ud" in text.lower()
    while True:
        at = _skip_blanks(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text.startswith("]", at):
            break
        try:
            with _decoding(f"{path}:{line}"):
                value, at = decoder.raw_decode(text, at)
                if halves:
                    _refuse_lone_surrogates(value)
        except UserError as wrapped:
            error = wrapped.__cause__
            if not isinstance(error, json.JSONDecodeError):
                raise
            raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
        yield _record(value, f"{path}:{line}")
        at = _skip_blanks(text, at)
        if text.startswith(",", at):
            at += 1
        elif not text.startswith("]", at):
            raise UserError(f"{path}:{line + text.count(chr(10), counted, at)}: not valid JSON: expected ',' or ']'")
    if text[at + 1 :].strip():
        raise UserError(f"{path}:{line}: not valid JSON: there is text after the list")


def read_parquet(path: Path) -> Iterator[Row]:
    """Read the rows of a parquet file, counted from 1."""
    import pyarrow.parquet as pq

    with user_errors(f"{path}: not a readable parquet file"):
        batches = pq.ParquetFile(path).iter_batches(batch_size=1000)
    number = 0
    while True:
        with user_errors(f"{path}: not a readable parquet file, from row {number + 1} on"):
            batch = next(batches, None)
            records = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for record in records:
            number += 1
            yield Row(record, f"{path}:{number}")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": read_jsonl,
    "ndjson": read_jsonl,
    "json": read_json,
    "parquet": read_parquet,
}


CSV_OPTIONS = {"csv": "", "tsv": ", sep='\\t'"}  # not read here; the arguments that `datasets` needs to convert them


def reader_for(path: Path, format: str | None) -> Callable[[Path], Iterator[Row]]:
    """Return the reader of `path`: that of `format`, else that of its suffix."""
    suffix = format or path.suffix.removeprefix(".").lower()
    if suffix in CSV_OPTIONS:
        call = f"from datasets import load_dataset as load; load('csv', data_files='{path}'{CSV_OPTIONS[suffix]})['train']"
        wanted = path.with_suffix(".jsonl")
        raise UserError(
            f"{path}: .json, .jsonl and .parquet files are read, and this is a .{suffix}: convert it to one of them, for example"
            f" python -c \"{call}.to_json('{wanted}')\""
        )
    if suffix not in READERS:
        raise UserError(f"{path}: .json, .jsonl and .parquet files are read; name its kind with format: {' | '.join(READERS)}")
    return READERS[suffix]


NOT_READ = {"gz", "bz2", "xz", "zst", "zip", "lz4", "tar", "tgz", "csv", "tsv", "arrow", "feather", "pickle", "pkl"}  # data


def _files_below(root: Path) -> list[Path]:
    """Return the files below a directory, sorted, following links; names that start with a dot or an underscore are skipped."""
    files, ancestors = list[Path](), {root.resolve()}

    def walk(directory: Path) -> None:
        for entry in sorted(directory.iterdir()):
            if entry.name.startswith((".", "_")):
                continue
            if entry.is_file():
                files.append(entry)
            elif entry.is_dir() and (target := entry.resolve()) not in ancestors:
                ancestors.add(target)
                walk(entry)
                ancestors.discard(target)

    with user_errors(f"{root} cannot be searched"):
        walk(root)
    return sorted(files)


def files_by_split(root: Path) -> dict[str, list[Path]]:
    """Return the data files below `root` by the split in the name of their directory or file; '' where neither names one."""
    everything = _files_below(root)
    files = [p for p in everything if p.suffix.removeprefix(".").lower() in READERS]
    files = [p for p in files if p.name not in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")]
    kinds = sorted({p.suffix for p in files})
    if len(kinds) > 1:
        raise UserError(f"{root}: holds files of several kinds ({', '.join(kinds)}); give the files, or a directory of one kind")
    if files and (others := [p for p in everything if p.suffix.removeprefix(".").lower() in NOT_READ]):
        raise UserError(
            f"{root}: holds {others[0].relative_to(root)} next to {files[0].relative_to(root)}, and only {', '.join(kinds)} files"
            " are read: unpack or convert it, move it away, or give the files one by one"
        )
    if not files:
        saved = " (data written by save_to_disk must be written again with to_parquet)" if any(root.rglob("*.arrow")) else ""
        raise UserError(f"{root}: no .json, .jsonl or .parquet file in this directory{saved}")
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_of(path.relative_to(root)), []).append(path)
    if len(splits) > 1 and "" in splits:
        raise UserError(f"{root}: {splits[''][0].name} belongs to no split, other files do ({', '.join(filter(None, splits))})")
    return splits


SPLITS = ("train", "eval", "test", "validation", "valid", "val", "dev")
_NAMED = re.compile(rf"({'|'.join(SPLITS)})(?:$|[-_.])", re.IGNORECASE)
_SHARD = re.compile(r"(?:[-_.](?:part|shard)?[-_.]?\d+)+(?:[-_.]of[-_.]\d+)?$", re.IGNORECASE)


def _split_of(path: Path) -> str:
    """Return `test` for test/a.jsonl, test.jsonl and test-00000-of-00002.parquet, `test_prefs` for test_prefs-00000-of-00001."""
    parts = [_SHARD.sub("", part) for part in (*path.parts[:-1], path.stem)]
    return next((part.lower() for part in parts if _NAMED.match(part)), "")
