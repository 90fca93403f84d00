"""Tokenised blocks of a stream: one is made ahead of training, and used ones are removed, so that disk use is bounded."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from halos import confined
from halos.data.cache import ABOUT, META, Held, touch
from halos.data.compose import Entry
from halos.data.dataset import Counts, Dataset, is_whole
from halos.data.names import names_of
from halos.data.prepare import Making, make
from halos.data.row import Row
from halos.data.shards import SHARD, Shards, write_shard
from halos.data.sources import OpenSource
from halos.data.stream_rows import Place, StreamReader
from halos.data.tokenise_worker import Worker, WorkerError
from halos.data.writer import Writer
from halos.errors import UserError

log = logging.getLogger(__name__)

OF_STREAM = "stream"  # in the metadata of a block: what a data set has not


@dataclass(frozen=True, slots=True)
class Block:
    """A tokenised block."""

    number: int  # in its epoch
    after: Place | None  # where the next one begins; None after the last one of an epoch
    report: tuple[Counts, ...]  # one for each source of the stream
    content: str  # a hash of its items
    span: str  # its first and its last row
    data: Dataset | None  # None where no example is kept

    @property
    def kept(self) -> int:
        return len(self.data) if self.data is not None else 0


class Blocks:
    """The blocks of one run's stream below `directory`. Every process that makes one makes the same."""

    def __init__(self, directory: Path, sources: Sequence[OpenSource], making: Making, size: int, base: Path) -> None:
        """`size`: rows of a block; `base`: the cache_dir."""
        self._directory, self._sources, self._base = directory, sources, base
        self._reader, self._key, self._made = StreamReader(sources, size), f"{making.key(sources)} {size}", making.made()
        # a copy for the thread that makes blocks: others change the padding and truncation of a tokenizer while they use it
        own = replace(making, tokenizer=copy.deepcopy(making.tokenizer))
        (self._tokenise, again), self._limit = own.tokenisers(), own.limit()
        self._entries = [Entry(each, Shards(directory, each.source.path, self._tokenise, base, {}), again) for each in sources]
        self._worker: Worker | None = None
        self._is_local = False  # the settings cannot be sent to another process
        self.leads = False  # makes blocks ahead, and removes used ones: one process, or one of each host without a common cache
        self._left: Set[int] = frozenset()  # when blocks were last removed
        self._turn = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="halos stream")
        self._coming: Future[None] | None = None
        self._held = Held(directory)

    def get(self, number: int, place: Place) -> Block:
        """Return a block, made now if it is not there. Raises UserError, naming the row, where it cannot be made."""
        if self._coming is not None:
            self._coming.exception()  # its error is raised below, if this is its block
            self._coming = None
        path = self._path(number)
        if not self._is_there(number, place):
            self._make(number, place)
            self.leads = True
        meta = confined.load_object(path / META)
        of_stream, report = meta[OF_STREAM], tuple(Counts(**counts) for counts in meta["report"])
        kept = sum(counts.kept for counts in report)
        after = None if of_stream["after"] is None else Place.of(of_stream["after"])
        return Block(number, after, report, meta["content"], of_stream["span"], Dataset(path) if kept else None)

    def ahead(self, number: int, place: Place) -> None:
        """Let a thread make a block."""
        if self.leads and self._coming is None:
            self._coming = self._thread.submit(self._make, number, place)

    def at_hand(self) -> list[int]:
        """Return the numbers of the blocks on the disk."""
        found = self._directory.iterdir() if self._directory.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def remove_all_but(self, numbers: Set[int]) -> None:
        """Remove other blocks, in the process that leads. Who has opened one can still read it."""
        if self.leads and numbers != self._left:
            for number in set(self.at_hand()) - numbers:
                shutil.rmtree(self._path(number), ignore_errors=True)
            self._left = frozenset(numbers)

    def close(self, *, remove: bool) -> None:
        """End what is in progress; with `remove` nothing is left on the disk."""
        if self._worker is not None:
            self._worker.close()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if remove and self.leads:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._held.close()

    # --- how a block is made ---------------------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:06d}"

    def _is_there(self, number: int, place: Place) -> bool:
        """Return whether a block is there as this process would make it."""
        if not is_whole(path := self._path(number)):
            return False
        return confined.load_object(path / META)[OF_STREAM]["made_of"] == self._made_of(place)

    def _made_of(self, place: Place) -> list[Any]:
        return [self._key, json.loads(json.dumps(place))]

    def _make(self, number: int, place: Place) -> None:
        with self._turn:
            path = self._path(number)
            if is_whole(path):
                if self._is_there(number, place):
                    return
                shutil.rmtree(path)  # of an earlier run in the same directory
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                sources = " + ".join(each.source.path for each in self._sources)
                confined.write_whole(self._directory / ABOUT, json.dumps({"source": sources, "made": self._made}))
                make(path, lambda hidden: self._write(hidden, place), None, part=self._directory)
                touch(self._directory)
            except OSError as error:
                raise UserError(f"cache_dir={self._base}: the blocks of the stream cannot be written there: {error}") from error

    def _write(self, directory: Path, place: Place) -> None:
        for leftover in self._directory.glob(".*"):  # of a process that was killed: nobody else writes now
            if leftover != directory:
                shutil.rmtree(leftover, ignore_errors=True)
        rows, after = self._reader.read(place)
        report, kind = [Counts(each.source.path, files=each.files) for each in self._sources], self._tokenise.kind.__name__
        with closing(Writer(directory)) as writer:
            for number, entry in enumerate(self._entries):
                own = [row for source, row in rows if source == number]
                for written, kept in self._kept(directory / "shard", entry, own, report[number], apart=len(rows) > SHARD):
                    kind = written if kept.num_rows else kind
                    writer.write(kept, [number] * kept.num_rows)
            span = f"{rows[0][1].where} to {rows[-1][1].where}" if rows else "no rows"
            facts = {"kind": kind, "weights": [1.0] * len(report), "names": names_of([each.source for each in self._sources])}
            writer.finish({**facts, "report": [asdict(counts) for counts in report],
                           OF_STREAM: {"made_of": self._made_of(place), "after": after, "span": span}})  # fmt: skip

    def _kept(
        self, shard: Path, entry: Entry, rows: Sequence[Row], counts: Counts, *, apart: bool
    ) -> Iterator[tuple[str, pa.Table]]:
        """Tokenise rows of one source, and yield the examples within max_length as rows for Writer; what becomes of the rows of
        the file is added to `counts`. `apart`: in another process, if that is possible."""
        path = entry.source.source.path
        for start in range(0, len(rows), SHARD):
            some = rows[start : start + SHARD]
            if not apart or not self._tokenised_apart(shard, some, path):
                write_shard(shard, some, self._tokenise, path)
            yield from entry.of_shard(shard, counts, self._limit, lambda some=some: some)
            shutil.rmtree(shard)

    def _tokenised_apart(self, shard: Path, rows: Sequence[Row], path: str) -> bool:
        """Tokenise in another process; return whether that is possible."""
        if self._is_local:
            return False
        try:
            self._worker = self._worker or Worker(self._tokenise)
            self._worker.write_shard(shard, rows, path)
        except WorkerError as error:
            log.info("the thread that reads the stream tokenises too: %s", error)
            self._is_local = True
        return not self._is_local
