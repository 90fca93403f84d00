"""Tokenised shards of large sources: made by several processes at once, kept as each is finished, and shared by all data sets
that have the source, so that an interruption or another mixture costs only what is not there yet."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from halos import confined
from halos.data.cache import ABOUT, Held, touch
from halos.data.dataset import META, Counts, Dataset, is_whole, publish
from halos.data.remarks import Remarks
from halos.data.row import Row
from halos.data.row_tokeniser import RowTokeniser
from halos.data.tokenise_worker import Worker, WorkerError
from halos.data.writer import OF_SET, Writer, as_rows, with_ids
from halos.errors import UserError
from halos.examples import Item

log = logging.getLogger(__name__)

SHARD = 4000  # rows; a source with no more is tokenised in this process
MOST_PROCESSES = 32
LIST = "shards.json"  # of a source that is whole: the number of its shards
HERE = "\0"  # in the place of a source's path, which may be another when its shards are read


def processes() -> int:
    """Return how many processes tokenise: one for each core that this one may use."""
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Shard:
    """Tokenised rows of any length; what is counted of those that are kept is for the reader to count."""

    counts: Counts  # of rows read, and examples dropped for what they say
    kind: str  # the type of its examples
    remarks: Sequence[Remarks]
    data: Dataset | None  # its `sources` are indices into remarks; None where no example is kept
    place: Callable[[str], str]  # of a row, by that in the file

    def batches(self) -> Iterator[pa.Table]:
        """Yield its examples as rows for a data set."""
        for batch in self.data.batches() if self.data else ():
            yield with_ids(batch.drop_columns(OF_SET), [self.place(each) for each in batch["id"].to_pylist()])

    def item(self, row: int) -> tuple[Item, Remarks]:
        assert self.data is not None
        each = self.data[row]
        return replace(each, id=self.place(each.id)), self.remarks[self.data.sources[row]]


class Shards:
    """The shards of one source below `directory`, whose name is a hash of all that they depend on. `path` is the source's."""

    def __init__(self, directory: Path, path: str, tokenise: RowTokeniser, cache: Path, about: Mapping[str, Any]) -> None:
        """`about` is for people who look into the cache."""
        self._directory, self._path, self._tokenise, self._cache, self._about = directory, path, tokenise, cache, about

    def held(self) -> closing[Held]:
        """Inside, no other process removes them."""
        return closing(Held(self._directory))

    def known(self) -> list[Path] | None:
        """Return all shards, if the source has been tokenised to its end."""
        try:
            listed = confined.load_object(self._directory / LIST)
            count = int(listed["shards"])
            if listed != self._list(count):  # a smaller number would lose rows
                return None
        except (UserError, OSError, KeyError, ValueError, TypeError):
            return None
        touch(self._directory)
        shards = [self._shard(number) for number in range(count)]
        return shards if all(is_whole(shard, self._cache) for shard in shards) else None

    def made(self, chunks: Iterator[Sequence[Row]]) -> Iterator[Path]:
        """Yield the shards of a source in their order, of so many rows each; those that are there are not made again."""
        self._directory.mkdir(parents=True, exist_ok=True)
        confined.write_whole(self._directory / ABOUT, json.dumps(self._about))
        number, first, second = -1, next(chunks, []), next(chunks, [])
        with _Pool(self._tokenise, processes() if second else 1) as pool:
            waiting: deque[tuple[Path, Future[None] | None]] = deque()
            for number, rows in enumerate(chain([first], [second] if second else [], chunks)):
                shard = self._shard(number)
                made = None if is_whole(shard, self._cache) else pool.submit(partial(self._make, rows, shard))
                waiting.append((shard, made))
                while len(waiting) > pool.size or (waiting and (waiting[0][1] is None or waiting[0][1].done())):
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        confined.write_whole(self._directory / LIST, json.dumps(self._list(number + 1)))

    def _list(self, count: int) -> dict[str, Any]:
        seal = hashlib.sha256(f"{self._directory.name} {count}".encode()).hexdigest()
        return {"shards": count, "seal": seal}

    def read(self, shard: Path) -> Shard:
        meta = confined.load_object(shard / META)
        (report,) = meta["report"]
        counts, is_empty = Counts(**report), not report["kept"]  # then the rows are no Arrow file
        counts.places = {why: [self._place(where) for where in places] for why, places in counts.places.items()}
        counts.kept = 0
        remarks = [Remarks.read(each) for each in meta["remarks"]]
        return Shard(counts, meta["kind"], remarks, None if is_empty else Dataset(shard), self._place)

    def _place(self, where: str) -> str:
        return self._path + where.removeprefix(HERE) if where.startswith(HERE) else where

    def _shard(self, number: int) -> Path:
        return self._directory / f"{number:06d}"

    def _make(self, rows: Sequence[Row], shard: Path, worker: Worker | None) -> None:
        if shard.exists():  # asked first: another run may publish it at any moment, and it is whole then
            if is_whole(shard, self._cache):
                return
            log.warning("%s is damaged: it is written again", shard)
            shutil.rmtree(shard)
        hidden = shard.with_name(f".{shard.name}-{uuid.uuid4().hex[:8]}")
        try:
            if worker is None:
                write_shard(hidden, rows, self._tokenise, self._path)
            else:
                worker.write_shard(hidden, rows, self._path)
            publish(hidden, shard)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def _finished(shard: Path, made: Future[None] | None) -> Path:
    if made is not None:
        made.result()
    return shard


def write_shard(directory: Path, rows: Sequence[Row], tokenise: RowTokeniser, path: str) -> None:
    """Tokenise rows into a new directory. Raises UserError, naming the row."""
    directory.mkdir()
    counts, kind = Counts(""), tokenise.kind
    with closing(Writer(directory)) as writer:
        remarks = dict[Remarks, int]()
        for written, outcomes in tokenise.batches(rows, counts):
            kind, items, sources = written, list[Item](), list[int]()
            for where, _, result in outcomes:
                if isinstance(result, str):
                    counts.drop(result, where)
                    continue
                each, remark = result
                items.append(replace(each, id=_here(each.id, path)))
                sources.append(remarks.setdefault(remark, len(remarks)))
            counts.kept += len(items)
            writer.write(as_rows(items), sources)
        counts.places = {why: [_here(where, path) for where in places] for why, places in counts.places.items()}
        writer.finish({"kind": kind.__name__, "weights": [1.0], "report": [asdict(counts)],
                       "remarks": [asdict(each) for each in remarks]})  # fmt: skip


def _here(where: str, path: str) -> str:
    return HERE + where.removeprefix(path) if path and where.startswith(path) else where


def in_chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Yield rows by the shard. An error of reading is raised after the rows before it."""
    while True:
        chunk: list[Row] = []
        try:
            chunk.extend(islice(rows, SHARD))
        except UserError as error:
            if chunk:
                yield chunk
            raise error
        if not chunk:
            return
        yield chunk


class _Pool:
    """Threads, each with a process that tokenises; with a single core, or settings that cannot be sent, this process does it."""

    def __init__(self, tokenise: RowTokeniser, size: int) -> None:
        self.size = size
        self._tokenise, self._of_thread, self._here = tokenise, threading.local(), threading.Lock()
        self._workers, self._is_local = list[Worker](), self.size == 1
        self._threads = ThreadPoolExecutor(self.size, thread_name_prefix="tokenise")

    def submit(self, make: Callable[[Worker | None], None]) -> Future[None] | None:
        """Call `make` with a worker of its own, in a thread; or at once with None."""
        if self.size == 1:
            return make(None)
        return self._threads.submit(self._run, make)

    def _run(self, make: Callable[[Worker | None], None]) -> None:
        try:
            if not self._is_local:
                make(self._worker())
                return
        except WorkerError as error:
            log.info("one process tokenises: %s", error)
            self._is_local = True
        with self._here:
            make(None)

    def _worker(self) -> Worker:
        if not hasattr(self._of_thread, "worker"):
            self._of_thread.worker = Worker(self._tokenise)
            self._workers.append(self._of_thread.worker)
        return self._of_thread.worker

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True)
