"""The training batches of a stream: rows that are read and tokenised in blocks while the run trains."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from halos.config.bind import LossSpec
from halos.config.schema import Config
from halos.confined import expanded
from halos.data.cache import STREAMS
from halos.data.custom_format import entries_of
from halos.data.dataset import Dataset
from halos.data.dates import content_entry, date_of
from halos.data.order import Order
from halos.data.prepare import Making
from halos.data.sources import OpenSource, Source, content_hash, open_source
from halos.data.split import splits_of
from halos.data.stream import Position, StreamOrder, StreamPartners, StreamRows, lines_of
from halos.data.stream_blocks import Block, Blocks
from halos.data.stream_rows import Place
from halos.distributed.agreement import require_same_on_all_ranks
from halos.distributed.turns import rank_0_first
from halos.errors import UserError
from halos.hashes import json_hash
from halos.hooks.base import Hook, Run
from halos.inspection.findings import Check, refuse_errors
from halos.inspection.steps import Steps
from halos.online.unsharded import Unsharded
from halos.run import available_metrics, datasets
from halos.run.batch_source import DatasetSource, TrainerData
from halos.trainers.microbatches import Split
from halos.types import Mismatched

log = logging.getLogger(__name__)

STREAM = "stream"  # name of the hook that holds the position


class StreamPosition(Hook):
    """Keeps with each checkpoint where its next batch begins in the stream."""

    def __init__(self) -> None:
        self.restored: Position | None = None
        self._followed: tuple[StreamOrder, Blocks] | None = None
        self._run: Run | None = None

    def follow(self, order: StreamOrder, blocks: Blocks, run: Run) -> None:
        self._followed, self._run = (order, blocks), run

    def on_end(self, run: Run) -> None:
        """Blocks of a finished run go; those of another are of use to a resume."""
        if self._followed is not None:
            finished = run.step >= run.total_steps and not run.stopped_early and not run.failure
            self._followed[1].close(remove=finished)

    def state_dict(self) -> dict[str, Any]:
        if self._followed is None or self._run is None:
            return {}
        return self._followed[0].state(self._run.step)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = Position.of(state)


class StreamSource(DatasetSource):
    """Batches of a stream. Header, checks and estimates are of its first block; of a resumed run, of the block it goes on in."""

    def __init__(
        self, config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, max_length: int
    ) -> None:
        refuse_unfit(config, loss)
        self._config, self._loss, self._tokenizer, self._accelerator = config, loss, tokenizer, accelerator
        making = datasets.making(config, loss, tokenizer, max_length, "train")
        base, place = expanded(config.cache_dir), str(Path(config.run_dir).resolve())
        directory = base / STREAMS / json_hash(place)[:32]
        self._blocks = Blocks(directory, self._opened(making), making, config.data.stream_block, base)
        self._blocks.leads = accelerator.is_main_process
        self._stream = StreamOrder(self._blocks, self._fetch, self._partners, config.train.batch_size, config.seed,
                                   config.train.steps or 0)  # fmt: skip
        self.eval_data = datasets.load_eval(config, loss, tokenizer, accelerator, max_length)
        if self.eval_data is not None and isinstance(self.eval_data.rows, Dataset):
            available_metrics.refuse_empty_source(config, loss, self.eval_data.rows)
        self.unmeasured = datasets.unavailable_metrics(config, loss, self.eval_data)
        self.completed, self.steps_per_epoch, self.total = loss.inputs.example.completed, None, config.train.steps or 0
        self._known, self._is_begun = set[int](), False  # blocks of which log or header tell
        self._position = Position()
        self.checks: tuple[Check, ...] = ()
        self.splits = [("held out", self.eval_data)] if self.eval_data else []
        if not config.resume or config.dry_run:
            self._begin(self._position, 0)

    def _opened(self, making: Making) -> list[OpenSource]:
        sources, problem = list[OpenSource](), None
        with rank_0_first():
            try:
                entries = [Source.of(entry) for entry in entries_of(self._config.data, "train")]
                sources = [open_source(entry, making.kind, "train") for entry in entries]
            except UserError as error:
                problem = str(error)
        key = None if problem else making.key(sources)
        require_same_on_all_ranks(self._accelerator, "data.train (by its hash)", key, problem)
        return sources

    def _begin(self, position: Position, step: int) -> None:
        """Go to a position, of a step, and describe its block."""
        self._position = position
        self._block = self._stream.start(position, step)
        assert self._block.data is not None, "the stream starts at a block with rows"
        rows, config = self._block.data, self._config
        self._known.add(self._block.number)
        self._is_begun = True
        self.train = datasets.split_of(rows, self._loss, config.seed, "train")
        self.order = Order(rows.sources, rows.weights, config.train.batch_size, config.seed)  # for estimates
        self.checks = datasets.checks(self.train, self.eval_data, self._loss, self._tokenizer, config.train.temperature)
        self.splits = [("train", self.train), *([("held out", self.eval_data)] if self.eval_data else [])]

    # --- blocks ----------------------------------------------------------------------------------------------------------

    def _fetch(self, number: int, place: Place) -> Block:
        """Every rank calls; the first makes a block that is not there, and the others wait as long as it takes."""
        block, problem = None, None
        with rank_0_first():
            try:
                block = self._blocks.get(number, place)
            except UserError as error:
                problem = str(error)
        content = block.content if block is not None else None
        require_same_on_all_ranks(self._accelerator, f"block {number + 1} of data.train (by its hash)", content, problem)
        assert block is not None
        if block.data is not None and self.known_ids is not None:
            datasets.refuse_unknown_ids(self.known_ids, [("train", Split(block.data, None))])
        if number not in self._known and (self._is_begun or not block.kept):
            self._tell(block)
        return block

    def _tell(self, block: Block) -> None:
        """Log what became of the rows of a block, and check them as those of the first. Raises UserError as for the first."""
        self._known.add(block.number)
        for line in lines_of(block):
            log.info("%-10s block %d: %s", "stream", block.number + 1, line)
        if block.data is None:
            return
        checks = datasets.checks(
            Split(block.data, None), self.eval_data, self._loss, self._tokenizer, self._config.train.temperature
        )
        refuse_errors(checks)
        for finding in (each for check in checks for each in check.findings if each.level == "warning"):
            if self._accelerator.is_main_process:
                log.warning("block %d: %s", block.number + 1, finding.line())

    def _partners(self, block: Block) -> np.ndarray | None:
        assert block.data is not None
        try:
            partners = datasets.split_of(block.data, self._loss, self._config.seed, "train").mismatched_partners
        except UserError as error:
            raise UserError(f"{block.span}: {error}; a larger data.stream_block, or rows in another order, may help") from error
        return partners if isinstance(partners, np.ndarray) else None

    # --- what a run is told ----------------------------------------------------------------------------------------------

    def steps(self) -> Steps:
        assert self._block.data is not None
        is_epoch = self._block.number == 0 and self._block.after is None  # whose last batch takes what is left
        rows = None if is_epoch else self._config.train.batch_size
        return Steps.of(self._block.data, self.order, self.total, part="block", rows_a_step=rows)

    def lines(self) -> list[tuple[str, str]]:
        size, at, number = self._config.data.stream_block, self._position, self._block.number + 1
        which = f"block {number}" if at != Position() else "the first block"
        lines = [("train", f"{which} of {line}") for line in lines_of(self._block)]
        lines += [("held out", line) for line in self.eval_data.rows.lines()] if self.eval_data else []
        where = "" if at == Position() else f"it goes on in epoch {at.epoch + 1} with block {number}; "
        return [*lines, ("stream", f"blocks of {size} rows in the order of the files, each shuffled; {where}counts, first row,"
                                   f" checks and tokens here are of {which} alone")]  # fmt: skip

    def content_hashes(self) -> dict[str, str | None]:
        entries = entries_of(self._config.data, "train")
        held_out = self.eval_data.rows if self.eval_data else None
        return {"data.train": json_hash([content_hash(entry, "train") for entry in entries]),
                "data.eval": held_out.content if isinstance(held_out, Dataset) else None,
                **content_entry(date_of(self._tokenizer))}  # fmt: skip

    def tokens_until(self, step: int) -> None:
        return None

    def open(self, run: Run, policy: Unsharded) -> TrainerData:
        position = run.hooks[STREAM]
        assert isinstance(position, StreamPosition)
        if self._config.resume:
            start = position.restored or Position()
            self._begin(start.of_changed_files() if self._config.resume_changes == "allow" else start, run.step)
            refuse_errors(self.checks)
        position.follow(self._stream, self._blocks, run)
        self._stream.ahead()
        partners = StreamPartners(self._stream.opened) if self._loss.statistics_inputs is Mismatched else None
        rows = StreamRows(self._stream.opened, self.train.rows.labels)
        return TrainerData(Split(rows, partners), self.eval_data, self._stream)


def refuse_unfit(config: Config, loss: LossSpec) -> None:
    """Raises UserError for a loss that needs rows of several blocks at once, and for splits that need the number of rows."""
    if loss.on_rollouts:
        raise UserError(
            f"data.stream: {loss.name} compares completions of one prompt, which may be in two blocks: leave data.stream out"
        )
    for entry in entries_of(config.data, "train"):
        source = Source.of(entry)
        bounds = [bound for split in splits_of(source.split) for bound in (split.start, split.stop) if bound is not None]
        if not all(bound.isdecimal() for bound in bounds):
            raise UserError(
                f"data entry {source.path}: split={source.split} needs the number of rows, which data.stream does not know: give"
                " rows, such as train[:10000]"
            )
