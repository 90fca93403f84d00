"""Read rows of parquet and arrow files, counted from 1."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from halos.data.numbers import ClassNumber, verdict_in
from halos.data.row import Row
from halos.errors import UserError, user_errors

BATCH = 1000  # rows converted at once
END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an arrow stream


def read_parquet(path: Path) -> Iterator[Row]:
    """Read the rows of a parquet file."""
    import pyarrow.parquet as pq

    with user_errors(f"{path}: not a readable parquet file"):
        batches = pq.ParquetFile(path).iter_batches(batch_size=BATCH)
    return _rows(batches, path, "parquet")


def read_arrow(path: Path) -> Iterator[Row]:
    """Read the rows of an arrow file: a stream, as save_to_disk writes it, or a file with a footer, which feather is too."""
    with user_errors(f"{path}: not a readable arrow file"):
        batches = _arrow_batches(path)
    return _rows(batches, path, "arrow")


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    source = pa.OSFile(str(path), "rb")  # not mapped: a file that another process shortens would end this one
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(max(0, source.size() - len(END)))
        is_whole = source.read(len(END)) == END
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        if not is_whole:
            raise UserError(f"{path}: has no end, so a part of it is missing: copy it again") from None
        return iter(stream)
    return (reader.get_batch(number) for number in range(reader.num_record_batches))


def _rows(batches: Iterator[Any], path: Path, kind: str) -> Iterator[Row]:
    number, classes, twice = 0, dict[str, Sequence[str]](), list[str]()
    while True:
        with user_errors(f"{path}: not a readable {kind} file, from row {number + 1} on"):
            batch = next(batches, None)
            if batch is not None:
                batch.validate(full=True)  # offsets of a damaged file would be followed anywhere
                twice = [name for name, count in Counter(batch.schema.names).items() if count > 1]
        if batch is None:
            return
        if twice:
            raise UserError(f"{path}: two columns are named '{twice[0]}': write the file again with a name for each")
        classes = classes or class_names(batch.schema.metadata)
        for start in range(0, batch.num_rows, BATCH):
            with user_errors(f"{path}: not a readable {kind} file, from row {number + 1} on"):
                records = batch.slice(start, BATCH).to_pylist()
            for record in records:
                number += 1
                yield Row(with_classes(record, classes), f"{path}:{number}")


def class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, Sequence[str]]:
    """Return the names of the classes of columns that hold their numbers, where all are verdicts; `datasets` keeps them beside a
    table, by its features."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        classes = {name: each["names"] for name, each in features.items() if each.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # of another writer, or another version
        return {}
    return {name: names for name, names in classes.items() if all(verdict_in(each) is not None for each in names)}


def with_classes(record: dict[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Let numbers of classes whose names are verdicts know them."""
    known = {name: ClassNumber.of(number, names[number]) for name, names in classes.items()
             if isinstance(number := record.get(name), int) and 0 <= number < len(names)}  # fmt: skip
    return {**record, **known} if known else record
