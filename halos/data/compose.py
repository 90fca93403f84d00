"""From tokenised shards to the data set of a run: its sources one after another, within train.max_length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from halos.data import arrow
from halos.data.dataset import Counts
from halos.data.limit import Limit
from halos.data.mixture import Amount
from halos.data.names import names_of
from halos.data.progress import Progress
from halos.data.remarks import Remarks
from halos.data.row import Row
from halos.data.row_tokeniser import RowTokeniser
from halos.data.shards import Shard, Shards, in_chunks
from halos.data.sources import OpenSource
from halos.data.writer import LABEL, NO_ROWS, Writer, as_rows
from halos.errors import UserError
from halos.examples import Item, Scored

REPEATED = "completions that another pair of their prompt has too"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of data.train or data.eval."""

    source: OpenSource
    shards: Shards
    again: RowTokeniser  # of rows that are to lose turns: within max_length

    def batches(self, counts: Counts, limit: Limit) -> Iterator[tuple[str, pa.Table]]:
        """Yield its examples as rows for Writer, some at a time, with the name of their type, and add what becomes of the rows
        of the file to `counts`."""
        known, chunks = self.shards.known(), _chunks(self.source)
        for number, path in enumerate(self.shards.made(in_chunks(self.source.rows())) if known is None else known):
            yield from self.of_shard(path, counts, limit, lambda n=number: next(rows for m, rows in chunks if m == n))

    def of_shard(
        self, path: Path, counts: Counts, limit: Limit, rows: Callable[[], Sequence[Row]]
    ) -> Iterator[tuple[str, pa.Table]]:
        """As `batches`, of one shard, which was made of `rows`."""
        shard = self.shards.read(path)
        counts.add(shard.counts)
        if shard.data is None:
            yield shard.kind, NO_ROWS
            return
        shortened, is_left, start = self._shortened(shard, limit, rows), limit.leaves(shard.data.lengths), 0

        def fit(item: Item, remarks: Remarks) -> tuple[Item, Remarks] | str:
            return shortened.get(item.id) or limit.fitted(item, remarks)

        for batch in shard.batches():
            numbers = np.arange(start, start := start + batch.num_rows)
            yield shard.kind, _fitted(shard, batch, numbers, is_left[numbers], fit, counts)

    def _shortened(
        self, shard: Shard, limit: Limit, rows: Callable[[], Sequence[Row]]
    ) -> Mapping[str, tuple[Item, Remarks] | str]:
        """Return by their ids the examples of a shard that lose turns: their text is rendered again. `rows` are the shard's."""
        if shard.data is None:
            return {}
        by_ids = np.array([each.by_ids for each in shard.remarks])[shard.data.sources]
        if not len(longer := limit.to_render_again(shard.data, by_ids)):
            return {}
        ids = {shard.item(int(row))[0].id for row in longer}
        places = {name.rpartition("#")[0] for name in ids}
        made = self.again.batches([row for row in rows() if row.where in places], Counts(""))
        found = {each.id: each.result for _, outcomes in made for each in outcomes if each.id in ids}
        if found.keys() != ids:
            raise UserError(f"{self.source.source.path}: it gives other rows than when it was read before: start again")
        return found


def _fitted(
    shard: Shard, batch: pa.Table, numbers: np.ndarray, is_left: np.ndarray,
    fit: Callable[[Item, Remarks], tuple[Item, Remarks] | str], counts: Counts,
) -> pa.Table:  # fmt: skip
    """Return those rows of a batch that are kept, each as it is where `is_left` (N,), else as `fit` makes it, and count them.
    `numbers` (N,) are their numbers in the shard."""
    assert shard.data is not None
    remarks = shard.data.sources[numbers]
    together = is_left & np.array([each.is_plain for each in shard.remarks])[remarks]
    for number, examples in zip(*np.unique(remarks[together], return_counts=True), strict=True):
        shard.remarks[number].count_plain(int(examples), counts)
    order, others, ids = np.arange(len(numbers)), list[Item](), batch["id"].to_pylist()
    for row in np.flatnonzero(~together):
        where = ids[row].rpartition("#")[0]
        if is_left[row]:
            shard.remarks[remarks[row]].count(where, counts)
            continue
        if isinstance(result := fit(*shard.item(int(numbers[row]))), str):
            counts.drop(result, where)
            order[row] = -1
            continue
        order[row] = len(numbers) + len(others)
        others.append(result[0])
        result[1].count(where, counts)
    kept = order[order >= 0]
    if len(kept) == len(numbers) and not others:
        return batch
    return pa.concat_tables([batch, as_rows(others)] if others else [batch]).take(kept)


def _each_once(rows: pa.Table, halves: set[tuple[int, int, float]], counts: Counts) -> pa.Table:
    """Return rows without halves of pairs that are among `halves` by prompt, completion and reward, and add the others to it. A
    completion that was preferred to three others was sampled once, and counts once in the mean of its group."""
    if not rows.num_rows:
        return rows
    columns = [arrow.numbers(rows[name]).tolist() for name in ("prompt_key", "completion_0_key", f"{LABEL}reward")]
    kept = list[int]()
    for row, (name, key) in enumerate(zip(rows["id"].to_pylist(), zip(*columns, strict=True), strict=True)):
        where, _, number = name.rpartition("#")
        if number == "0":
            kept.append(row)
        elif key in halves:
            counts.kept -= 1
            counts.drop(REPEATED, where)
        else:
            halves.add(key)
            kept.append(row)
    return rows if len(kept) == rows.num_rows else rows.take(kept)


def _chunks(source: OpenSource) -> Iterator[tuple[int, list[Row]]]:
    yield from enumerate(in_chunks(source.rows()))


def write(directory: Path, entries: Sequence[Entry], limit: Limit, made: Mapping[str, Any]) -> None:
    """Write the data set; `made` is for people who look into the cache. Raises UserError, naming the row or the source."""
    report, kind, progress, halves = [], "", Progress(), set[tuple[int, int, float]]()
    with progress, closing(Writer(directory)) as writer:
        for number, entry in enumerate(entries):
            source = entry.source.source
            counts = Counts(source.path, files=entry.source.files)
            report.append(counts)
            with entry.shards.held():
                for written, rows in entry.batches(counts, limit):
                    kind = written if rows.num_rows or not kind else kind  # of no examples it is not known
                    rows = _each_once(rows, halves, counts) if written == Scored.__name__ else rows
                    writer.write(rows, [number] * rows.num_rows)
                    progress.reach(source.path, sum(each.rows for each in report))
            if not counts.kept and not entry.source.may_be_empty:
                raise UserError(f"{counts.line()}: none of them can be used")
        if not any(counts.kept for counts in report):
            raise UserError("data.eval_fraction holds none of the rows of data.train out: increase it, or give data.eval")
        sources = [entry.source.source for entry in entries]
        weights = [1.0 if source.weight is None else source.weight for source in sources]
        amounts, names = [Amount.of(source) for source in sources], names_of(sources)
        facts = {"kind": kind, "weights": weights, "amounts": amounts, "names": names, "made": made}
        writer.finish({**facts, "report": [asdict(counts) for counts in report]})
