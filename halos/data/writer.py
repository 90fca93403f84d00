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
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for item in items:
        columns["prompt"].append(item.prompt)
        columns["prompt_key"].append(_key(item.prompt))
        for name, completion in zip(names, item.completions, strict=True):
            columns[name].append(completion.ids)
            columns[f"{name}_spans"].append(spans := _spans(completion.scored))
            columns[f"{name}_scored"].append(int((spans[1::2] - spans[::2]).sum()))
            columns[f"{name}_key"].append(_key(completion.ids))
        for name, value in item.labels.items():
            columns[LABEL + name].append(value)
        columns["logps"].append(() if item.logps is None else item.logps)
        columns["teacher_logps"].append(() if item.teacher_logps is None else item.teacher_logps.reshape(-1))
        if item.step_labels is not None:
            columns["step_labels"].append(item.step_labels)
        columns["id"].append(item.id)
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
        parts = list(self._parts(rows))
        labels = {name: numbers(rows[LABEL + name]).tolist() for name in self._labels}
        for row, source in enumerate(sources):
            own = {name: values[row] for name, values in labels.items()}
            # three come first, whether a row has them or not: as they stand in the hashes that runs have recorded
            always = [bool(own.pop("desirable", 1.0)), own.pop("margin", 0.0), own.pop("reward", 0.0)]
            present = [(lengths[row], data[row]) for lengths, data in parts if lengths[row] is not None]
            lengths = [length for length, _ in present]
            self._content.update(json.dumps([source, *always, lengths, *([own] if own else [])]).encode())
            for _, data in present:
                self._content.update(data)

    def _parts(self, rows: pa.Table) -> Iterator[tuple[list[int | None], list[memoryview]]]:
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


def _spans(scored: np.ndarray) -> np.ndarray:
    """Return the runs of True as [start, end, start, end, ...]."""
    if scored.all():
        return np.array([0, len(scored)], np.int32)
    return np.flatnonzero(np.diff(scored, prepend=False, append=False)).astype(np.int32)


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    return np.diff(lists(column)[0])


def _bytes(column: pa.ChunkedArray) -> list[memoryview]:
    """Return the numbers of each list of a column as bytes."""
    bounds, values = lists(column)
    return _cut(values, bounds * values.itemsize)


def _masks(ids: pa.ChunkedArray, spans: pa.ChunkedArray) -> list[memoryview]:
    """Return which tokens of each list are scored, a byte each."""
    (tokens, _), (bounds, edges) = lists(ids), lists(spans)
    edges = edges + np.repeat(tokens[:-1], np.diff(bounds))
    changes = np.zeros(tokens[-1] + 1, np.int8)
    np.add.at(changes, edges[::2], 1)
    np.add.at(changes, edges[1::2], -1)
    return _cut(np.cumsum(changes[:-1], dtype=np.int8), tokens)


def _cut(values: np.ndarray, bounds: np.ndarray) -> list[memoryview]:
    data = np.ascontiguousarray(values).view(np.uint8).data
    return [data[start:end] for start, end in pairwise(bounds.tolist())]
