"""Read rows of parquet and arrow files, counted from 1."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    number = 0
    while True:
        with user_errors(f"{path}: not a readable {kind} file, from row {number + 1} on"):
            batch = next(batches, None)
            if batch is not None:
                batch.validate(full=True)  # offsets of a damaged file would be followed anywhere
        if batch is None:
            return
        for start in range(0, batch.num_rows, BATCH):
            with user_errors(f"{path}: not a readable {kind} file, from row {number + 1} on"):
                records = batch.slice(start, BATCH).to_pylist()
            for record in records:
                number += 1
                yield Row(record, f"{path}:{number}")
