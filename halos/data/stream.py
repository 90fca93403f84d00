"""Rows of a stream as a trainer reads them: batches in an order that is shuffled within blocks, from any position on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from halos.data.dataset import Counts, Dataset
from halos.data.order import block_order
from halos.data.stream_blocks import Block, Blocks
from halos.data.stream_rows import START, Place
from halos.errors import UserError
from halos.examples import Item

log = logging.getLogger(__name__)

SPAN = 2**32  # rows are numbered through all blocks: that of the run's block n begin at n times this
NO_ROWS = np.zeros(0, np.int64)
RESTORE = "a file has changed since; restore it, or resume with resume_changes=allow"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a batch begins, and what the stream has held before it."""

    epoch: int = 0
    block: int = 0  # in the epoch
    taken: int = 0  # rows of the block's order before the batch
    serial: int = 0  # number of the block in the run
    place: Place = START  # where the block's rows begin
    content: str = ""  # hash of the block's items, where it was open
    before: str | None = ""  # hash of all blocks before it in the epoch; None where one of them may have changed
    whole: str = ""  # hash of all blocks of the first epoch, once it is over
    report: tuple[Counts, ...] = ()  # of the blocks before it in the epoch, one for each source

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Position:
        """Return the position that `state` gave. Raises KeyError, TypeError or ValueError for another mapping."""
        counts = tuple(Counts(**each) for each in state["report"])
        epoch, block, taken, serial = (int(state[name]) for name in ("epoch", "block", "taken", "serial"))
        before = None if state["before"] is None else str(state["before"])
        return cls(
            epoch, block, taken, serial, Place.of(state["place"]), str(state["content"]), before, str(state["whole"]), counts
        )

    def of_changed_files(self) -> Position:
        """Return it without what would tell that files have changed, and by lines instead of bytes."""
        return replace(self, place=self.place.of_changed_files(), content="", before=None, whole="")

    def state(self) -> dict[str, Any]:
        """Return it as values that JSON keeps."""
        source, rows, end = self.place
        report = [asdict(each) for each in self.report]
        return {**{name: getattr(self, name) for name in ("epoch", "block", "taken", "serial", "content", "before", "whole")},
                "place": [source, rows, None if end is None else list(end)], "report": report}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OpenBlock:
    """A block that batches are taken from."""

    block: Block
    order: np.ndarray  # (rows,)
    partners: np.ndarray | None  # (rows,) of a loss on mismatched completions, each of another prompt of the block


class Column:
    """A column of the rows of open blocks."""

    def __init__(self, opened: Mapping[int, OpenBlock], read: Callable[[Dataset], np.ndarray], *, apart: bool = False) -> None:
        """`apart`: numbers of different blocks are different."""
        self._opened, self._read, self._apart = opened, read, apart

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        serials = rows // SPAN
        parts = {serial: self._of(int(serial), rows[serials == serial] % SPAN) for serial in np.unique(serials)}
        first = next(iter(parts.values()), np.zeros(0, np.int64))
        values = np.empty((len(rows), *first.shape[1:]), np.int64 if self._apart else first.dtype)
        for serial, part in parts.items():
            values[serials == serial] = part + serial * SPAN if self._apart else part
        return values

    def _of(self, serial: int, rows: np.ndarray) -> np.ndarray:
        data = self._opened[serial].block.data
        assert data is not None
        return self._read(data)[rows]


class StreamRows:
    """The rows of the blocks at hand, by their numbers in the run."""

    sampled_here = False

    def __init__(self, opened: Mapping[int, OpenBlock], labels: Iterable[str]) -> None:
        """`labels` are the names of the rows' labels."""
        self._opened = opened
        self.groups: Any = Column(opened, lambda data: data.groups, apart=True)
        self.prompt_lengths: Any = Column(opened, lambda data: data.prompt_lengths)
        self.scored: Any = Column(opened, lambda data: data.scored)
        self.lengths: Any = Column(opened, lambda data: data.lengths)
        self.labels: Any = {name: Column(opened, lambda data, name=name: data.labels[name]) for name in labels}

    def __len__(self) -> int:
        return sum(each.block.kept for each in list(self._opened.values()))

    def __getitem__(self, row: int) -> Item:
        data = self._opened[row // SPAN].block.data
        assert data is not None
        return data[row % SPAN]

    def lines(self) -> list[str]:
        return [line for each in list(self._opened.values()) for line in lines_of(each.block)]


class StreamPartners:
    """For each row another of its block, of another prompt."""

    def __init__(self, opened: Mapping[int, OpenBlock]) -> None:
        self._opened = opened

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        partners = [self._partner(int(row) // SPAN, int(row) % SPAN) for row in rows]
        return np.array(partners, np.int64)

    def _partner(self, serial: int, row: int) -> int:
        partners = self._opened[serial].partners
        assert partners is not None
        return serial * SPAN + int(partners[row])


def lines_of(block: Block) -> list[str]:
    """Return what became of the rows of a block, a line for each source that it has rows of."""
    return [counts.line() for counts in block.report if counts.rows]


class StreamOrder:
    """Global batches of a stream: blocks in the order of the files, each shuffled anew in every epoch.

    Every rank asks for the same batches, each once and in their order.
    """

    def __init__(
        self, blocks: Blocks, fetch: Callable[[int, Place], Block], partners: Callable[[Block], np.ndarray | None],
        batch_size: int, seed: int, total: int,
    ) -> None:  # fmt: skip
        """`fetch` gives a block, by its number in the epoch and its place; it may make ranks wait for each other. `total`:
        batches that will be asked for."""
        self._blocks, self._fetch, self._partners = blocks, fetch, partners
        self._batch_size, self._seed, self._total = batch_size, seed, total
        self.opened = dict[int, OpenBlock]()  # by their numbers in the run
        self._position, self._next = Position(), 0  # of the next batch, and its number
        self._batches = dict[int, tuple[Position, np.ndarray]]()  # those of open blocks, and where each begins

    def start(self, position: Position, number: int) -> Block:
        """Go to where a batch begins, and return the first block with rows from there on."""
        self._position, self._next = position, number
        self._batches.clear()
        self.opened.clear()
        while self._position.taken >= len((each := self._open()).order):
            self._go_on(each.block)
        return each.block

    def batch(self, number: int) -> np.ndarray:
        """Return the rows of a batch; the last one of an epoch may be smaller. Of an earlier one whose block is gone: none.

        Raises UserError, on every rank, where a block cannot be made.
        """
        if number < self._next:
            return self._batches[number][1] if number in self._batches else NO_ROWS
        assert number == self._next, f"batch {number} is asked for before batch {self._next}"
        self._drop(number - 1)
        begin, parts, missing = self._position, list[np.ndarray](), self._batch_size
        while missing:
            each, taken = self._open(), self._position.taken
            if len(rows := each.order[taken : taken + missing]):
                parts.append(rows + self._position.serial * SPAN)
                missing -= len(rows)
                self._position = replace(self._position, taken=taken + len(rows))
            elif each.block.after is None and parts:
                break
            else:
                self._go_on(each.block)
        self._batches[number] = begin, np.concatenate(parts)
        self._next += 1
        self.ahead()
        return self._batches[number][1]

    def state(self, number: int) -> dict[str, Any]:
        """Return where a batch begins, the next one or one of an open block, as values that JSON keeps."""
        assert number in self._batches or number == self._next
        begin = self._batches[number][0] if number in self._batches else self._position
        opened = self.opened.get(begin.serial)
        return replace(begin, content=opened.block.content if opened else begin.content).state()

    def ahead(self) -> None:
        """Remove blocks from the disk that are used, and let a thread make the next one if it will be needed: at most two are
        there."""
        if len(self.opened) > 1:
            return
        ((current, order),) = ((each.block, each.order) for each in self.opened.values())
        number, place = (0, START) if current.after is None else (current.number + 1, current.after)
        self._blocks.remove_all_but({current.number, number})
        is_needed = (self._total - self._next) * self._batch_size > len(order) - self._position.taken
        if number != current.number and is_needed:
            self._blocks.ahead(number, place)

    def _drop(self, number: int) -> None:
        """Close blocks that neither this batch, which is in use, nor later ones need."""
        rows = self._batches[number][1] if number in self._batches else NO_ROWS
        needed = {*np.unique(rows // SPAN).tolist(), self._position.serial}
        if gone := self.opened.keys() - needed:
            self._batches = {n: each for n, each in self._batches.items() if gone.isdisjoint((each[1] // SPAN).tolist())}
        for serial in gone:
            del self.opened[serial]

    def _open(self) -> OpenBlock:
        position = self._position
        if position.serial not in self.opened:
            block = self._fetch(position.block, position.place)
            if position.content not in ("", block.content):
                raise UserError(f"data.train: the rows {block.span} are others than when the run read them: {RESTORE}")
            order = block_order(self._seed, position.epoch, block.number, block.kept)
            partners = self._partners(block) if block.data is not None else None
            self.opened[position.serial] = OpenBlock(block, order, partners)
        return self.opened[position.serial]

    def _go_on(self, block: Block) -> None:
        """Go to the next block, perhaps of the next epoch. Raises UserError at the end of an epoch without a row, or with other
        rows than the first had."""
        position = self._position
        before = None if position.before is None else hashlib.sha256((position.before + block.content).encode()).hexdigest()
        report = _added(position.report, block.report)
        if block.after is not None:
            self._position = Position(position.epoch, position.block + 1, 0, position.serial + 1, block.after, before=before,
                                      whole=position.whole, report=report)  # fmt: skip
            return
        lines = "; ".join(counts.line() for counts in report)
        if not any(counts.kept for counts in report):
            raise UserError(f"data.train: {lines}: none of them can be used")
        if position.whole and before not in (None, position.whole):
            raise UserError(f"data.train: epoch {position.epoch + 1} had other rows than the first: {RESTORE}")
        log.info("%-10s epoch %d is over: %s", "stream", position.epoch + 1, lines)
        self._position = Position(position.epoch + 1, serial=position.serial + 1, whole=position.whole or before or "")


def _added(one: Sequence[Counts], other: Sequence[Counts]) -> tuple[Counts, ...]:
    total = [Counts(**asdict(counts)) for counts in one or [Counts(counts.name, files=counts.files) for counts in other]]
    for counts, more in zip(total, other, strict=True):
        counts.add(more)
    return tuple(total)
