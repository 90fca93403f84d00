"""The reference's log-probs as data: computed once for all rows of a run's datasets, and then no reference model is held."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from halos.checkpoint.manifest import human_size
from halos.distributed.agreement import from_rank_0
from halos.errors import UserError
from halos.examples import PackRow, row_hash
from halos.trainers.logps_table import LogpsCache, Part, Table
from halos.trainers.reference_rows import Plan, Source, sources
from halos.types import Acted

if TYPE_CHECKING:
    from halos.trainers.microbatches import Split
    from halos.trainers.objective import Objective

log = logging.getLogger(__name__)

REPORT_EVERY = 60.0  # seconds between two lines of the log
WAIT = 1.0  # seconds between two looks at what another run computes


class StopRequestedError(Exception):
    """Stopped, on every rank, while log-probs were being computed; what is missing is computed on resume."""


@dataclass(frozen=True, slots=True)
class ReferenceCache:
    """Where the reference's log-probs are kept, and where they come from."""

    cache_dir: Path
    depends_on: Mapping[str, Any]  # all that decides them besides the rows; the same on all ranks
    load: Callable[[], nn.Module | None]  # the reference; None where the policy in memory can compute as its reference
    visited: np.ndarray | None = None  # items of the training data to read, ascending; None: all


class ReferenceLogps:
    """Log-probs of the reference for the rows in `splits`, found by their content."""

    def __init__(self, trainer: Objective, splits: Mapping[str, Split], cache: ReferenceCache) -> None:
        self.trainer, self.run, self._cache = trainer, trainer.run, cache
        self._splits, self._sources = splits, list(sources(trainer, splits, cache.visited))
        self._visited: np.ndarray | None = None  # (items,) bool: those of the training data that are read; None: all
        if cache.visited is not None:
            self._visited = np.isin(np.arange(len(splits["train"].rows)), cache.visited)
        self._tables: list[Table] | None = None
        self._loaded = False  # the reference, for all passes

    def of(self, rows: Sequence[PackRow]) -> np.ndarray:
        """Log-probs of the scored tokens of all rows, end to end: (scored,) float32; with k likeliest ids (scored, 1 + 2 k)."""
        return np.concatenate([self.find(row) for row in rows])

    def prepare(self) -> None:
        """Read all tables, and compute what is missing. Every rank calls. Raises StopRequestedError, and UserError where they
        cannot be written or read."""
        if self._tables is None:
            self._tables = self._tables_of(self._sources)

    def _tables_of(self, some: Sequence[Source]) -> list[Table]:
        before = self.trainer.reference
        try:
            return [self._table(source) for source in some]
        finally:
            self.trainer.reference, self._loaded = before, False

    def cover(self, split: Split, indices: np.ndarray) -> None:
        """Prepare; and where items of a step are not among those that the run was to see, read all. Every rank calls, with the
        same items. Raises as `prepare`."""
        if self._visited is not None and split is self._splits["train"] and not self._visited[indices].all():
            whole = list(sources(self.trainer, self._splits, None))
            self._sources, self._tables, self._visited = whole, self._tables_of(whole), None  # a thread may read the former ones
        self.prepare()

    def find(self, row: PackRow) -> np.ndarray:
        """The log-probs of a row's scored tokens: (tokens,) float32. Raises UserError for a row that is of no data set, and
        RuntimeError before `prepare`: by the time of a step the policy may no longer be the reference that it starts as."""
        if self._tables is None:
            raise RuntimeError("a step was taken before Trainer.prepare_reference, which `fit` calls first")
        key = row_hash(row)
        found = (logps for table in self._tables if (logps := table.find(key)) is not None)
        if (logps := next(found, None)) is None:
            raise UserError(
                f"{type(self.trainer).__name__} or {self.trainer.loss.inputs.__name__} makes rows of a micro-batch that are not"
                " those of its items alone, so that the reference's log-probs of them are not known: reference.cache=never"
            )
        return logps

    # --- one table -------------------------------------------------------------------------------------------------------

    def _table(self, source: Source) -> Table:
        """The table of a source: that of the cache, else computed now, by one of all runs that need it."""
        cache = LogpsCache(self._cache.cache_dir, {**self._cache.depends_on, **source.facts})
        is_mine = is_written = is_waiting = False
        try:
            while (table := self._read(cache)) is None:
                if is_mine and is_written:
                    raise UserError(
                        f"{cache.path} cannot be read again as it was written: another cache_dir, or reference.cache=never"
                    )
                if is_mine:
                    self._compute(source, cache)
                    is_written = True
                    continue
                is_mine = self._from_rank_0(cache.acquire)
                if not is_mine:
                    self._raise_if_stopped()
                    if not is_waiting:
                        log.info("another run is computing the same reference log-probs (%s): waiting for it", source.name)
                    is_waiting = True
                    time.sleep(WAIT)
        finally:
            cache.release()
        self._compare_with_start(source, cache, table)
        return table

    def _read(self, cache: LogpsCache) -> Table | None:
        """The table in the cache, the same on every rank; a host that does not share the cache gets it from rank 0."""
        mine: Table | None = None

        def is_there() -> bool:
            nonlocal mine
            mine = cache.open()
            return mine is not None

        if not self._from_rank_0(is_there):
            return None
        if not self.run.main:
            mine = cache.open()
        contents = gather_object([mine.content if mine is not None else None])
        if len(set(contents)) == 1:
            return mine
        whole = self._from_rank_0(lambda: mine and mine.in_memory())
        return mine if self.run.main else whole

    def _compare_with_start(self, source: Source, cache: LogpsCache, table: Table) -> None:
        """Warn if the run began with other numbers of the same reference: its steps will not be bit for bit what they were."""
        now, before = f"{cache.key} {table.content}", self.run.reference.get(source.name)
        if before is not None and before != now and before.split()[0] == now.split()[0] and self.run.main:
            log.warning(
                "the reference's log-probs of %s had to be computed again, and differ from those that this run began with by the"
                " rounding of another machine: it does not continue bit for bit", source.name,
            )  # fmt: skip
        self.run.reference[source.name] = now

    def _from_rank_0(self, function: Callable[[], Any]) -> Any:
        try:
            return from_rank_0(self.run.accelerator, function)
        except OSError as error:
            raise UserError(
                f"cache_dir={self._cache.cache_dir}: the reference's log-probs cannot be kept there: {error}. Another cache_dir,"
                " or reference.cache=never, which computes them at every step"
            ) from error

    def _raise_if_stopped(self) -> None:
        self.run.sync_stop_request()
        if self.run.stopped_early:
            raise StopRequestedError

    # --- the pass --------------------------------------------------------------------------------------------------------

    def _compute(self, source: Source, cache: LogpsCache) -> None:
        """Compute all parts that an interrupted pass has not left, and publish the table. All ranks compute, rank 0 writes."""
        run, settings, parts = self.run, self.trainer.settings, list[Part]()
        plan = Plan.of(source, settings, run.microbatch_tokens, is_checkpointed=run.activation_checkpointing)
        trainer, quiet, began, cpu = self.trainer, None if run.main else True, time.perf_counter(), time.process_time()
        if not self._loaded:
            trainer.reference, self._loaded = self._cache.load(), True
        done = reused = reports = 0
        bar = tqdm(total=int(plan.tokens.sum()), desc=f"reference, {source.name}", unit=" tokens", unit_scale=True, delay=2,
                   leave=False, disable=quiet)  # fmt: skip
        try:
            for number, batches in enumerate(plan.parts):
                which = np.concatenate(batches)
                part, size = cache.part(number, plan.hashes[which]) if run.main else None, int(plan.tokens[which].sum())
                if self._from_rank_0(lambda part=part: part is not None):
                    reused += size
                else:
                    part = Part.of(plan.hashes[which], self._forward(source, plan, batches, bar))
                    self._from_rank_0(lambda number=number, part=part: cache.keep(number, part))
                    done += size
                parts += [part] if part is not None else []
                bar.n = done + reused
                reports = self._report(source, plan, done, reused, time.perf_counter() - began, reports)
        finally:
            bar.close()
        run.strategy.reshard(trainer.reference if trainer.reference is not None else run.module)
        self._from_rank_0(lambda: cache.publish(parts))
        run.reference_cpu_seconds += time.process_time() - cpu
        self._say(source, cache, plan, done, reused, time.perf_counter() - began)

    def _forward(self, source: Source, plan: Plan, batches: list[np.ndarray], bar: tqdm) -> list[np.ndarray]:
        """The log-probs of a part's rows, on every rank; each batch is computed by one of them."""
        rank, world = self.run.accelerator.process_index, self.run.accelerator.num_processes
        computed = list[tuple[int, list[np.ndarray]]]()
        for first in range(0, len(batches), world):
            self._raise_if_stopped()
            is_mine = first + rank < len(batches)
            which = batches[first + rank] if is_mine else batches[0][:1]
            # without a batch left too: all ranks take part in a sharded model's collectives
            logps = self._logps([source.rows_of(item)[number] for item, number in plan.places[which].tolist()])
            computed += [(first + rank, logps)] if is_mine else []
            bar.update(int(plan.tokens[np.concatenate(batches[first : first + world])].sum()))
        return [row for _, rows in sorted(gather_object(computed), key=lambda pair: pair[0]) for row in rows]

    @torch.no_grad()
    def _logps(self, rows: Sequence[PackRow]) -> list[np.ndarray]:
        batch = self.trainer.packed(rows, by=self.trainer.reference)
        with self.run.accelerator.autocast():
            output = self.trainer._refer(batch)
        logps = output.logps if isinstance(output, Acted) else output
        values, counts = logps.values.float(), logps.mask.sum(1).tolist()
        if logps.candidates is not None and logps.ids is not None:
            values = torch.cat([values[..., None], logps.candidates.float(), logps.ids.float()], -1)
        table = values.cpu().numpy()
        return [table[n, :count] for n, count in enumerate(counts)]

    # --- its lines in the log --------------------------------------------------------------------------------------------

    def _report(self, source: Source, plan: Plan, done: int, reused: int, seconds: float, reports: int) -> int:
        """A line for logs, in which no bar is seen, every REPORT_EVERY seconds; return how many there were."""
        if seconds < (reports + 1) * REPORT_EVERY or not done:
            return reports
        total = int(plan.tokens.sum())
        left = (total - done - reused) * seconds / done
        log.info("reference  %s: %d of %d tokens read, about %.0f s left", source.name, done + reused, total, left)
        return int(seconds / REPORT_EVERY)

    def _say(self, source: Source, cache: LogpsCache, plan: Plan, done: int, reused: int, seconds: float) -> None:
        size = human_size(sum(path.stat().st_size for path in cache.path.glob("*"))) if self.run.main else ""
        before = f", {reused} of them before" if reused else ""
        few = len(source.items) < source.of
        name = f"{source.name} ({len(source.items)} of {source.of} items: those of the run's steps)" if few else source.name
        log.info("%-10s log-probs of %s, %d rows of %d tokens%s, in %.1f s (%.0f tokens a second): %s in %s", "reference",
                 name, len(plan.hashes), done + reused, before, seconds, done / seconds, size, cache.path)  # fmt: skip
