"""Convert Arrow columns to and from numpy by their buffers: pyarrow's conversions import pandas, which takes up to a second."""

from typing import Any

import numpy as np
import pyarrow as pa

_DTYPES: dict[pa.DataType, Any] = {
    pa.int8(): np.int8, pa.int32(): np.int32, pa.int64(): np.int64, pa.float32(): np.float32, pa.float64(): np.float64,
}  # fmt: skip
INTS, FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())


def column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Return an Arrow array of numbers, strings or (INTS, FLOATS) arrays of numbers, none of them null."""
    if kind in (INTS, FLOATS):
        return pa.ListArray.from_arrays(_flat(_offsets(values), pa.int32()), _flat(np.concatenate(values), kind.value_type))
    if kind == pa.string():
        texts = [text.encode() for text in values]
        return pa.StringArray.from_buffers(len(texts), pa.py_buffer(_offsets(texts)), pa.py_buffer(b"".join(texts)))
    return _flat(values, kind)


def _offsets(values: list[Any]) -> np.ndarray:
    return np.cumsum([0, *map(len, values)], dtype=np.int32)


def _flat(values: Any, kind: pa.DataType) -> pa.Array:
    array = np.ascontiguousarray(values, _DTYPES[kind])
    return pa.Array.from_buffers(kind, len(array), [None, pa.py_buffer(array)])


def _view(array: pa.Array) -> np.ndarray:
    """View the numbers of one array without copying."""
    dtype = np.dtype(_DTYPES[array.type])
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of numbers: (N,)."""
    return np.concatenate([_view(chunk) for chunk in column.chunks])


def lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lists of a column of one chunk: list n is values[bounds[n]:bounds[n + 1]]. `bounds` is (N + 1,), from 0 on."""
    (chunk,) = column.chunks
    bounds, values = _view(chunk.offsets).astype(np.int64), _view(chunk.values)
    return bounds - bounds[0], values[bounds[0] : bounds[-1]]


class Lists:
    """A column of lists as views into the mapped file."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [(_view(chunk.offsets), _view(chunk.values)) for chunk in column.chunks]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in column.chunks])

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(self._starts.searchsorted(row, "right")) - 1
        offsets, values = self._chunks[chunk]
        index = row - int(self._starts[chunk])
        return values[offsets[index] : offsets[index + 1]]

    def lengths(self) -> np.ndarray:
        """Return the length of each list: (N,)."""
        return np.concatenate([np.diff(offsets) for offsets, _ in self._chunks])

    def starts(self, count: int) -> np.ndarray:
        """Return the first `count` numbers of each list, -1 beyond its end: (N, count)."""
        parts = []
        for offsets, values in self._chunks:
            at = offsets[:-1, None] + np.arange(count)
            inside = at < offsets[1:, None]
            parts.append(np.where(inside, values[np.where(inside, at, 0)] if len(values) else 0, -1))
        return np.concatenate(parts)
