"""The pass over rollouts before the policy learns from them: log-probs and values, cached for a resume."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from halos.checkpoint import lineage, manifest, select
from halos.checkpoint.commit import staged
from halos.data.dataset import Dataset
from halos.errors import UserError
from halos.trainers.reference import StopRequestedError
from halos.trainers.rollout_cache import Ragged, RolloutCache, load, save
from halos.types import Acted, TokenLogps

if TYPE_CHECKING:
    from halos.trainers.microbatches import Rows, Split
    from halos.trainers.objective import Objective

log = logging.getLogger(__name__)

NAME = "rollouts"  # directory in the run directory for the caches of data sets


class RolloutPass:
    """Caches of the rollouts in `splits`: of a data set computed once in a run, of a live loop once for a batch."""

    def __init__(self, trainer: Objective, splits: dict[str, Split]) -> None:
        self.trainer, self.run, self.loss = trainer, trainer.run, trainer.loss
        self.splits = {name: split for name, split in splits.items() if isinstance(split.rows, Dataset)}
        self._loaded: dict[str, RolloutCache] = {}

    def of(self, split: Split) -> RolloutCache:
        name = next((name for name, each in self.splits.items() if each is split), None)
        if name is None:
            return self._of_live(split.rows)
        if name not in self._loaded:
            self._loaded[name] = self._load_or_compute(split, name)
        return self._loaded[name]

    def _of_live(self, rows: Any) -> RolloutCache:
        """The cache of a live batch: what advantages are computed from, and for several passes the old log-probs."""
        if rows.cache is None:
            in_advantages = self.loss.needs_reference and not self.loss.takes_reference
            rows.cache = self._compute(rows, reads_policy=in_advantages or self._valued or rows.passes > 1)
        return rows.cache

    def refuse_lost(self) -> None:
        """Raises UserError where a cache that a resume needs is damaged or missing; changes nothing."""
        for name, split in self.splits.items():
            self._is_cached(split, name)

    @property
    def _refers(self) -> bool:
        """Whether the pass computes the reference's log-probs; else they are not needed, or kept in the cache_dir."""
        return self.loss.needs_reference and self.trainer.reference_logps is None

    @property
    def _valued(self) -> bool:
        return self.loss.inputs.head == "value"

    # --- on the disk ---------------------------------------------------------------------------------------------------------

    def _load_or_compute(self, split: Split, name: str) -> RolloutCache:
        directory = self.run.directory.path / NAME / name
        if not self._is_cached(split, name):
            if self.run.main and self.run.step:
                message = "%s: data or settings have changed: computed again, with the policy of step %d"
                log.warning(message, directory, self.run.step)
            self._save(directory, split, name, self._compute(split.rows, reads_policy=True))
        kept = load(directory)
        if self.trainer.reference_logps is not None:
            return replace(kept, reference=self._known_reference(split.rows))
        if self._refers and kept.reference is None:  # it was kept apart, until reference.cache was changed
            _, known, _ = self._read(split.rows, reads_policy=False, refers=True)
            kept = replace(kept, reference=known)
            self._save(directory, split, name, kept)
        return kept

    def _save(self, directory: Path, split: Split, name: str, cache: RolloutCache) -> None:
        facts = {"rows": len(split.rows), "stands_on": self._dependencies(name)}
        with staged(directory, main=self.run.main, gather=gather_object, facts=facts) as hidden:
            if self.run.main:
                save(hidden, cache)

    def _known_reference(self, rows: Rows) -> Ragged:
        """The reference's log-probs of a data set, which are kept apart from what the policy computes."""
        known = self.trainer.reference_logps
        assert known is not None
        return Ragged.of([known.find(row) for n in range(len(rows)) for row in self.trainer.rows([rows[n]])])

    def _is_cached(self, split: Split, name: str) -> bool:
        """Whether the run directory has a valid cache of these rows. Raises UserError where that is lost, since the policy that
        computed it has been trained further."""
        directory, is_cached, problem = self.run.directory.path / NAME / name, False, None
        if self.run.main:
            listing = manifest.read(directory) if directory.is_dir() and not manifest.verify(directory) else None
            if isinstance(listing, dict):
                current = self._dependencies(name)  # which an older version did not record
                before = {**listing.get("stands_on", current), "reference": current["reference"]}  # which is computed at any step
                is_cached = listing.get("rows") == len(split.rows) and before == current
            elif self.run.step and self._had_cache(name):
                problem = (
                    f"{directory} is damaged or missing, and cannot be computed again, since the policy has been trained further:"
                    " start a new run"
                )
        is_cached, problem = gather_object([(is_cached, problem)])[0]
        if problem is not None:
            raise UserError(problem)
        return is_cached

    def _dependencies(self, name: str) -> dict[str, Any]:
        """Everything that the cache depends on besides the policy's training; on rank 0."""
        config, hashes = self.run.config, self.run.content.hashes if self.run.content is not None else {}
        models = ("model.weights", "reference.weights", "peft.init_from", "model.chat_template")
        settings = {"temperature": config.train.temperature, "adapter": config.reference.adapter}
        cached = {"reference": self._refers, "values": self._valued}
        return {"rows": hashes.get(f"data.{name}"), **{key: hashes.get(key) for key in models}, **settings, **cached}

    def _had_cache(self, name: str) -> bool:
        """Whether the run had the same data when it saved the checkpoint that it resumes from."""
        chain = lineage.read(self.run.directory.checkpoints / select.name_of(self.run.step))
        return chain is None or (chain["runs"][-1].get("content") or {}).get(f"data.{name}") == self._dependencies(name)["rows"]

    # --- the pass ------------------------------------------------------------------------------------------------------------

    def _compute(self, rows: Rows, *, reads_policy: bool) -> RolloutCache:
        """Compute what the loss needs of the current policy's log-probs and values, and of the reference's log-probs.

        Without `reads_policy` the policy is read only if the sampler kept no log-probs: a batch from which the policy learns in
        one step is read in that step anyway.
        """
        sampled = _of_sampler(rows)
        reads_policy |= sampled is None or bool(np.isnan(sampled.flat).any())
        if not reads_policy and not self._refers:
            return RolloutCache(None, sampled, None, None, step=self.run.step)
        old, reference, values = self._read(rows, reads_policy=reads_policy, refers=self._refers)
        return RolloutCache(old, sampled, reference, values, step=self.run.step)

    def _read(self, rows: Rows, *, reads_policy: bool, refers: bool) -> list[Ragged | None]:
        """The policy's log-probs of all rows, the reference's, and the policy's values; None of what is not read."""
        by_row = self._forward(rows, reads_policy=reads_policy, refers=refers)
        columns = zip(*(by_row[row] for row in range(len(rows))), strict=True)
        return [None if column[0] is None else Ragged.of(column) for column in columns]

    @torch.no_grad()
    def _forward(self, rows: Rows, *, reads_policy: bool, refers: bool) -> dict[int, list[np.ndarray | None]]:
        """Read all rows, a shard on each rank: row -> its log-probs, the reference's, its values, on every rank."""
        run, module, bounds = self.run, self.run.module, self.trainer.bounds
        was_training = module.training
        module.eval()
        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        dealt = bounds.deal(rows, np.arange(len(rows)), world)
        own = dealt[rank]
        computed: list[tuple[int, list[np.ndarray | None]]] = []
        numbers, quiet = range(max(map(len, dealt))), None if run.main else True
        for number in tqdm(numbers, desc="reading rollouts", unit="batch", delay=2, leave=False, disable=quiet):
            if isinstance(rows, Dataset):  # the loop itself stops after a live batch, which is small
                run.sync_stop_request()
                if run.stopped_early:
                    raise StopRequestedError
            some = own[number].tolist() if number < len(own) else []
            items = [rows[row] for row in some or [0]]  # a rank without rows left still takes part in collectives
            batch = self.trainer.packed(self.trainer.rows(items))
            with run.accelerator.autocast():
                reference = self.trainer._refer(batch) if refers else None
                output = module(batch) if reads_policy else None
            parts = [_logps(output), _logps(reference), output.values if isinstance(output, Acted) else None]
            lengths = [int(item.completions[0].scored.sum()) for item in items]
            for n, row in enumerate(some):
                computed.append((row, [None if part is None else part[n, : lengths[n]].float().cpu().numpy() for part in parts]))
        run.strategy.reshard(module)
        module.train(was_training)
        return dict(gather_object(computed))


def _of_sampler(rows: Rows) -> Ragged | None:
    """The sampler's log-probs, NaN in rows without; None where no row has any."""
    known = [logps if (logps := rows[row].logps) is not None and len(logps) else None for row in range(len(rows))]
    if all(logps is None for logps in known):
        return None
    lengths = rows.scored[:, 0]
    return Ragged.of([np.full(lengths[row], np.nan) if logps is None else logps for row, logps in enumerate(known)])


def _logps(output: Any) -> Tensor | None:
    output = output.logps if isinstance(output, Acted) else output
    return output.values if isinstance(output, TokenLogps) else None
