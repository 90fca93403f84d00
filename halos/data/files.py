"""Rows of json, jsonl and parquet files, each with the line it came from, so that a bad one can be named."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from halos.errors import UserError

_INK = re.compile(r"[^ \t\r\n]")


class Row(NamedTuple):
    """One row of data and where it stands: `train.jsonl:12`."""

    record: dict[str, Any]
    where: str


def _record(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row is an object with named columns, this is {_named(value)}")
    return Row(value, where)


def _named(value: Any) -> str:
    names = {"list": "a list", "str": "text", "int": "a number", "float": "a number", "bool": "true or false", "NoneType": "null"}
    return names.get(type(value).__name__, type(value).__name__)


def read_jsonl(path: Path) -> Iterator[Row]:
    """One object a line; blank lines are passed over."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
                if b"\\ud" in line.lower():
                    json.dumps(value, ensure_ascii=False).encode()  # half of a character, which no tokenizer takes
            except UnicodeEncodeError as error:
                raise UserError(f"{where}: holds half of a character, a lone surrogate such as \\ud800") from error
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 text") from error
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
            yield _record(value, where)


def read_json(path: Path) -> Iterator[Row]:
    """A list of objects, or objects line by line, as many a .json file really is."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    start = _skip(text, 0)
    if text.startswith("[", start):
        yield from _elements(text, start + 1, path)
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from read_jsonl(path)
            return
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    if isinstance(value, dict):
        lists = [key for key, held in value.items() if isinstance(held, list) and held and isinstance(held[0], dict)]
        held = f"its key '{lists[0]}' holds one: write that list" if lists else "write a list of such objects"
        raise UserError(f"{path}: holds one object, not a list of rows; {held} to a .json file, or one row a line to a .jsonl")
    raise UserError(f"{path}: a .json file holds a list of objects, this one {_named(value)}")


def _skip(text: str, at: int) -> int:
    """The next place from `at` on that is not blank."""
    found = _INK.search(text, at)
    return found.start() if found else len(text)


def _elements(text: str, at: int, path: Path) -> Iterator[Row]:
    """The elements of a JSON list that starts before `at`, each with the line on which it starts."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while True:
        at = _skip(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text.startswith("]", at):
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
        yield _record(value, f"{path}:{line}")
        at = _skip(text, at)
        if text.startswith(",", at):
            at += 1
        elif not text.startswith("]", at):
            raise UserError(f"{path}:{line + text.count(chr(10), counted, at)}: not valid JSON: expected ',' or ']'")
    if text[at + 1 :].strip():
        raise UserError(f"{path}:{line}: not valid JSON: something follows the list")


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a parquet file, counted from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file, number = pq.ParquetFile(path), 0
        for batch in file.iter_batches(batch_size=1000):
            for record in batch.to_pylist():
                number += 1
                yield Row(record, f"{path}:{number}")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": read_jsonl,
    "ndjson": read_jsonl,
    "json": read_json,
    "parquet": read_parquet,
}


TABLES = {"csv": "", "tsv": ", sep='\\t'"}  # read by nobody here: what datasets is told of them


def reader(path: Path, format: str | None) -> Callable[[Path], Iterator[Row]]:
    """How to read `path`: as `format` says, else by the end of its name."""
    suffix = format or path.suffix.removeprefix(".").lower()
    if suffix in TABLES:
        call = f"from datasets import load_dataset as load; load('csv', data_files='{path}'{TABLES[suffix]})['train']"
        wanted = path.with_suffix(".jsonl")
        raise UserError(
            f"{path}: .json, .jsonl and .parquet files are read, and this is a .{suffix}: write it as one of them, for example"
            f" python -c \"{call}.to_json('{wanted}')\""
        )
    if suffix not in READERS:
        raise UserError(f"{path}: .json, .jsonl and .parquet files are read; name its kind with format: {' | '.join(READERS)}")
    return READERS[suffix]


def in_directory(root: Path) -> dict[str, list[Path]]:
    """The data files below `root` by the split that their directory or name announces; '' where neither does."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix.removeprefix(".").lower() in READERS)
    files = [p for p in files if not any(part.startswith((".", "_")) for part in p.relative_to(root).parts)]
    files = [p for p in files if p.name not in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")]
    kinds = sorted({p.suffix for p in files})
    if len(kinds) > 1:
        raise UserError(f"{root}: holds files of several kinds ({', '.join(kinds)}); give the files, or a directory of one kind")
    if not files:
        saved = " (what save_to_disk wrote must be written again with to_parquet)" if any(root.rglob("*.arrow")) else ""
        raise UserError(f"{root}: no .json, .jsonl or .parquet file in this directory{saved}")
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_of(path.relative_to(root)), []).append(path)
    if len(splits) > 1 and "" in splits:
        raise UserError(f"{root}: {splits[''][0].name} belongs to no split, other files do ({', '.join(filter(None, splits))})")
    return splits


SPLITS = ("train", "eval", "test", "validation", "valid", "val", "dev")
_NAMED = re.compile(rf"({'|'.join(SPLITS)})(?:$|[-_.])", re.IGNORECASE)


def _split_of(path: Path) -> str:
    """`test` for test/a.jsonl, test.jsonl and test-00000-of-00002.parquet."""
    found = [match for part in (*path.parts[:-1], path.stem) if (match := _NAMED.match(part))]
    return found[0].group(1).lower() if found else ""
