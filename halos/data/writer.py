"""Write a tokenised data set: its Arrow file, batch by batch, and the hash of what training reads of it."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from halos.data.arrow import FLOATS, INTS, column, lists, numbers
from halos.data.cache import META
from halos.data.dataset import ROWS, SEAL, completion_columns, seal_of
from halos.examples import Item
from halos.hashes import digest

OF_SET = ["source", "group"]  # the columns that depend on the data set
LABEL = "label_"  # columns of numbers
NO_ROWS = pa.table({})


def as_rows(items: Sequence[Item]) -> pa.Table:
    """Return items of one example type as rows for `Writer`: the columns of a data set but OF_SET."""
    if not items:
        return NO_ROWS
    schema, names = _schema(items[0]), completion_columns(len(items[0].completions))
    columns: dict[str, Any] = {"prompt": [item.prompt for item in items]}
    for name, completions in zip(names, zip(*(item.completions for item in items), strict=True), strict=True):
        columns[name] = [each.ids for each in completions]
        columns[f"{name}_spans"], columns[f"{name}_scored"] = _spans([each.scored for each in completions])
    for name in ("prompt", *names):
        columns[f"{name}_key"] = [_key(ids) for ids in columns[name]]
    for name in items[0].labels:
        columns[LABEL + name] = [item.labels[name] for item in items]
    columns["logps"] = [() if item.logps is None else item.logps for item in items]
    columns["teacher_logps"] = [() if item.teacher_logps is None else item.teacher_logps.reshape(-1) for item in items]
    columns["step_labels"] = [item.step_labels for item in items]
    columns["id"] = [item.id for item in items]
    return pa.Table.from_arrays([column(columns[each.name], each.type) for each in schema], schema=schema)


def with_ids(rows: pa.Table, ids: Sequence[str]) -> pa.Table:
    """Return rows with other ids."""
    return rows.set_column(rows.schema.get_field_index("id"), "id", column(list(ids), pa.string()))


def _schema(item: Item) -> pa.Schema:
    names = completion_columns(len(item.completions))
    return pa.schema(
        [(name, INTS) for name in ("prompt", *names, *(f"{name}_spans" for name in names))]
        + [(f"{name}_scored", pa.int32()) for name in names]
        + [(f"{name}_key", pa.int64()) for name in ("prompt", *names)]
        + [(LABEL + name, pa.float64()) for name in item.labels]
        + [("step_labels", FLOATS)] * (item.step_labels is not None)
        + [("logps", FLOATS), ("teacher_logps", FLOATS), ("id", pa.string())]
    )


class Writer:
    """Appends rows to an Arrow file, a batch at a time; equal prompts get the same group number."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = (directory / ROWS).open("wb")
        self._arrow: pa.RecordBatchFileWriter | None = None  # opened with the first rows, which decide the columns
        self._completions, self._labels = list[str](), list[str]()
        self._groups: dict[bytes, int] = {}
        self._content, self._tokens, self._largest_id = hashlib.sha256(), 0, -1

    def write(self, rows: pa.Table, sources: Sequence[int]) -> None:
        """Write a batch of `as_rows`, each with the index of its source; all batches are of one example type."""
        if not rows.num_rows:
            return
        rows = rows.combine_chunks()
        if self._arrow is None:
            self._completions = [name for name in rows.column_names if f"{name}_spans" in rows.column_names]
            self._labels = [name.removeprefix(LABEL) for name in rows.column_names if name.startswith(LABEL)]
        prompts = [hashlib.blake2b(ids, digest_size=16).digest() for ids in _bytes(rows["prompt"])]
        groups = [self._groups.setdefault(prompt, len(self._groups)) for prompt in prompts]
        self._tokens += sum(int((_lengths(rows["prompt"]) + _lengths(rows[name])).sum()) for name in self._completions)
        largest = [int(lists(rows[name])[1].max(initial=-1)) for name in ("prompt", *self._completions)]
        self._largest_id = max(self._largest_id, *largest)
        self._hash(rows, sources)
        rows = rows.append_column("source", column(list(sources), pa.int32())).append_column("group", column(groups, pa.int64()))
        self._arrow = self._arrow or pa.ipc.new_file(self._file, rows.schema)
        self._arrow.write_table(rows)

    def _hash(self, rows: pa.Table, sources: Sequence[int]) -> None:
        """Add all that training reads of rows to the hash; not their ids, so that the same rows of another file hash equally."""
        lengths, data = (zip(*columns, strict=True) for columns in zip(*self._parts(rows), strict=True))
        labels = {name: numbers(rows[LABEL + name]).tolist() for name in self._labels}
        for row, (source, all_lengths, all_data) in enumerate(zip(sources, lengths, data, strict=True)):
            own = {name: values[row] for name, values in labels.items()}
            # three come first, whether a row has them or not: as they stand in the hashes that runs have recorded
            always = [bool(own.pop("desirable", 1.0)), own.pop("margin", 0.0), own.pop("reward", 0.0)]
            present = [length for length in all_lengths if length is not None]
            head = json.dumps([source, *always, present, *([own] if own else [])]).encode()
            read = [each for length, each in zip(all_lengths, all_data, strict=True) if length is not None]
            self._content.update(b"".join([head, *read]))

    def _parts(self, rows: pa.Table) -> Iterator[tuple[list[int | None], Iterator[memoryview]]]:
        """Yield the arrays of rows in the order in which they are hashed: the length of each row's, None where it has no such
        array, and its bytes."""
        yield _lengths(rows["prompt"]).tolist(), _bytes(rows["prompt"])
        for name in self._completions:
            lengths = _lengths(rows[name]).tolist()
            yield lengths, _bytes(rows[name])
            yield lengths, _masks(rows[name], rows[f"{name}_spans"])
        yield [length or None for length in _lengths(rows["logps"]).tolist()], _bytes(rows["logps"])
        if "step_labels" in rows.column_names:
            yield _lengths(rows["step_labels"]).tolist(), _bytes(rows["step_labels"])
        scored = numbers(rows[f"{self._completions[0]}_scored"])  # tokens, which a teacher says several numbers of each
        tokens = np.where(_lengths(rows["teacher_logps"]) > 0, scored, 0)
        yield [length or None for length in tokens.tolist()], _bytes(rows["teacher_logps"])

    def finish(self, meta: dict[str, Any]) -> None:
        """Write the metadata and sync both files to disk."""
        if self._arrow is not None:  # else the rows are none
            self._arrow.close()
        self._file.flush()
        amounts = [each for each in meta.get("amounts", ()) if each[0] is None and any(each)]  # counts and passes
        self._content.update(json.dumps([meta["kind"], meta["weights"], *([meta["amounts"]] if amounts else [])]).encode())
        whole = {**meta, "completions": len(self._completions), "labels": self._labels, "content": self._content.hexdigest(),
                 "tokens": self._tokens, "largest_id": self._largest_id, "rows": digest(self._directory / ROWS)}  # fmt: skip
        with (self._directory / META).open("w") as meta_file:
            json.dump({**whole, SEAL: seal_of(whole)}, meta_file, indent=1)
            for file in (self._file, meta_file):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()


def _key(ids: np.ndarray) -> int:
    """Return 64 bits that identify token ids by their content, the same in every data set."""
    return int.from_bytes(hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=8).digest(), signed=True)


def _spans(masks: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the runs of True of each mask as [start, end, start, end, ...], that of an empty one as [0, 0]; and how many of each
    are True: (N,)."""
    lengths = np.array([len(mask) for mask in masks])
    first = np.cumsum(lengths + 1) - lengths  # of each mask's places in all of them, with a False before and after each
    is_place = np.ones(first[-1] + lengths[-1] + 1, bool)
    is_place[[*(first - 1), -1]] = False
    flat = np.zeros_like(is_place)
    flat[is_place] = np.concatenate(masks)
    edges, counts = np.flatnonzero(flat[1:] != flat[:-1]) + 1, np.cumsum(flat)
    bounds = np.searchsorted(edges, [*first, len(flat)])
    edges -= np.repeat(first, np.diff(bounds))
    spans = [edges[start:end] if length else np.zeros_like(edges, shape=2)
             for length, (start, end) in zip(lengths, pairwise(bounds.tolist()), strict=True)]  # fmt: skip
    return spans, counts[first + lengths] - counts[first - 1]


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    return np.diff(lists(column)[0])


def _bytes(column: pa.ChunkedArray) -> Iterator[memoryview]:
    """Return the numbers of each list of a column as bytes."""
    bounds, values = lists(column)
    return _cut(values, bounds * values.itemsize)


def _masks(ids: pa.ChunkedArray, spans: pa.ChunkedArray) -> Iterator[memoryview]:
    """Return which tokens of each list are scored, a byte each."""
    (tokens, _), (bounds, edges) = lists(ids), lists(spans)
    edges = edges + np.repeat(tokens[:-1], np.diff(bounds))
    changes = np.zeros(tokens[-1] + 1, np.int8)
    np.add.at(changes, edges[::2], 1)
    np.add.at(changes, edges[1::2], -1)
    return _cut(np.cumsum(changes[:-1], dtype=np.int8), tokens)


def _cut(values: np.ndarray, bounds: np.ndarray) -> Iterator[memoryview]:
    data = np.ascontiguousarray(values).view(np.uint8).data  # one at a time: objects that are kept cost collections of garbage
    return (data[start:end] for start, end in pairwise(bounds.tolist()))
