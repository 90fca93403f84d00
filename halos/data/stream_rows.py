"""The rows of a stream, cut into blocks in the order of its sources; any block can be read without those before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from halos.data.row import UNKNOWN_OFFSET, End, Row
from halos.data.sources import OpenSource
from halos.errors import UserError


class Place(NamedTuple):
    """Where the rows of a block begin."""

    source: int = 0
    rows: int = 0  # of that source before it
    end: End | None = None  # of the last of them; None where rows can only be counted

    @classmethod
    def of(cls, values: Sequence[Any]) -> Place:
        """Return the place that JSON holds as a list."""
        source, rows, end = values
        return cls(int(source), int(rows), None if end is None else End(*map(int, end)))

    def of_changed_files(self) -> Place:
        """Return it by the number of its line: its byte may be another now."""
        return self if self.end is None else self._replace(end=self.end._replace(offset=UNKNOWN_OFFSET))


START = Place()


class BlockOfRows(NamedTuple):
    """Rows, each with the number of its source, and the place of the next block; None at the end of the stream."""

    rows: Sequence[tuple[int, Row]]
    after: Place | None


class StreamReader:
    """Reads blocks of `size` rows. The last block of an epoch has up to half as many more, so that none is much smaller."""

    def __init__(self, sources: Sequence[OpenSource], size: int) -> None:
        self._sources, self._size = sources, size
        self._place = START  # of the first row in `_ahead`
        self._ahead = deque[tuple[int, Row]]()
        self._rows: Iterator[tuple[int, Row]] | None = None  # None before the first, and after the last
        self._error: UserError | None = None  # of reading the row after those in `_ahead`

    def read(self, place: Place) -> BlockOfRows:
        """Return the block that begins there. Raises UserError, with the place, for a row of it that cannot be read."""
        if self._rows is None or place != self._place:
            self._ahead.clear()
            self._place, self._error, self._rows = place, None, self._from(place)
        self._fill(self._size + self._size // 2)
        if self._error is not None and len(self._ahead) < self._size:
            raise self._error
        is_last = self._error is None and len(self._ahead) < self._size + self._size // 2
        count = len(self._ahead) if is_last else self._size
        while not is_last and self._splits_row(count):
            count += 1
        rows = [self._ahead.popleft() for _ in range(count)]
        if is_last:
            self._rows = None
            return BlockOfRows(rows, None)
        self._place = _after(self._place, rows)
        return BlockOfRows(rows, self._place)

    def _fill(self, count: int) -> None:
        assert self._rows is not None
        try:
            self._ahead.extend(islice(self._rows, max(0, count - len(self._ahead))) if self._error is None else ())
        except UserError as error:
            self._error = error

    def _splits_row(self, count: int) -> bool:
        """Return whether rows that a function made of one row are on both sides of the first `count`."""
        self._fill(count + 1)
        if len(self._ahead) <= count:
            if self._error is not None:
                raise self._error
            return False
        (source, last), (next_source, following) = self._ahead[count - 1], self._ahead[count]
        return last.end is not None and (source, last.end) == (next_source, following.end)

    def _from(self, place: Place) -> Iterator[tuple[int, Row]]:
        for number in range(place.source, len(self._sources)):
            source = self._sources[number]
            if number > place.source or not place.rows:
                rows = source.rows()
            elif place.end is not None and source.after is not None:
                rows = source.after(place.end)
            else:
                rows = islice(source.rows(), place.rows, None)
            for row in rows:
                yield number, row


def _after(place: Place, rows: Sequence[tuple[int, Row]]) -> Place:
    source, last = rows[-1]
    count = sum(number == source for number, _ in rows)
    return Place(source, count + (place.rows if source == place.source else 0), last.end)
