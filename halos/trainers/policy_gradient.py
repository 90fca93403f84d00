"""Policy gradient losses on rollouts: caches old and reference log-probs, and computes advantages of global batches."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from halos.checkpoint import lineage, manifest, select
from halos.checkpoint.commit import staged
from halos.data.collate import pack
from halos.data.dataset import Dataset
from halos.errors import UserError
from halos.hooks.kl import KLCoefficient
from halos.trainers.base import Totals, Trainer
from halos.trainers.loss_checks import refuse_metrics
from halos.trainers.microbatches import MicroBatch, Split
from halos.trainers.rollout_cache import Ragged, RolloutCache, load, save
from halos.types import Acted, Estimates, Loss, Mean, RolloutBatch, RolloutInput, Sampled, TokenLogps

log = logging.getLogger(__name__)

NAME = "rollouts"  # directory in the run directory for the cache of what is computed before the first step


class StopRequestedError(Exception):
    """Stopped, on every rank, while log-probs were being computed; they are computed again on resume."""


class PolicyGradientTrainer(Trainer):
    """For losses on rollouts, whose first parameter is a RolloutInput.

    Log-probs under the policy that sampled and under the reference, and old values, do not change during training on a data set:
    they are computed before the first step and cached in the run directory, and every rank holds all of them. So advantages are
    computed over whole groups and whole global batches, however these are sharded, without communication.
    """

    @cached_property
    def _caches(self) -> dict[str, RolloutCache]:
        """Caches by split, filled on first use."""
        return {}

    def inputs(self, output: TokenLogps | Acted, microbatch: MicroBatch) -> RolloutInput:
        batch: RolloutBatch = microbatch.rollouts
        logps = output.logps if isinstance(output, Acted) else output
        width = logps.values.shape[1]
        inputs = self.loss.inputs
        assert issubclass(inputs, RolloutInput), "its input type names this trainer"
        return inputs.of_rollouts(output, _over_time(batch, lambda part: part[:, :width]))

    def refuse_lost_cache(self) -> None:
        for name, split in self._data_sets():
            self._is_cached(split, name)

    def prepare(self) -> None:
        try:
            for _, split in self._data_sets():
                self._cache_of(split)
        except StopRequestedError:
            return  # the loop stops for the same request
        if isinstance(self.train.rows, Dataset):
            self.reference = None  # its log-probs are all cached: free its memory

    def step(self, indices: np.ndarray) -> Totals:
        totals = super().step(indices)
        if self.loss.adapt is not None and "kl" in totals:
            kl, count = totals["kl"]
            controller = self._controller()
            totals = {**totals, "kl_coefficient": (controller.value, 1.0)}
            controller.value = self.loss.adapt(controller.value, kl / count, len(indices))
        return totals

    # --- the cache of what does not change during training ---------------------------------------------------------------

    def _data_sets(self) -> list[tuple[str, Split]]:
        named = (("train", self.train), ("eval", self.eval_data))
        return [(name, split) for name, split in named if split is not None and isinstance(split.rows, Dataset)]

    def _cache_of(self, split: Split) -> RolloutCache:
        """The cache of a split: of a data set computed once or loaded from the run directory; of a live step computed anew."""
        if not isinstance(split.rows, Dataset):
            return self._compute(split, None)
        name = "train" if split is self.train else "eval"
        if name not in self._caches:
            self._caches[name] = self._load_or_compute(split, name)
        return self._caches[name]

    def _load_or_compute(self, split: Split, name: str) -> RolloutCache:
        directory = self.run.directory.path / NAME / name
        if not self._is_cached(split, name):
            if self.run.main and self.run.step:
                message = "%s: data or settings have changed: computed again, with the policy of step %d"
                log.warning(message, directory, self.run.step)
            cache = self._compute(split, name)
            facts = {"rows": len(split.rows), "stands_on": self._dependencies(name)}
            with staged(directory, main=self.run.main, gather=gather_object, facts=facts) as hidden:
                if self.run.main:
                    save(hidden, cache)
        return load(directory)

    def _is_cached(self, split: Split, name: str) -> bool:
        """Whether the run directory has a valid cache of these rows. Raises UserError where that is lost, since the policy that
        computed it has been trained further."""
        directory, is_cached, problem = self.run.directory.path / NAME / name, False, None
        if self.run.main:
            listing = manifest.read(directory) if directory.is_dir() and not manifest.verify(directory) else None
            if isinstance(listing, dict):
                current = self._dependencies(name)  # which an older version did not record
                is_cached = listing.get("rows") == len(split.rows) and listing.get("stands_on", current) == current
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
        cached = {"reference": self.loss.needs_reference, "values": self.loss.inputs.head == "value"}
        return {"rows": hashes.get(f"data.{name}"), **{key: hashes.get(key) for key in models}, **settings, **cached}

    def _had_cache(self, name: str) -> bool:
        """Whether the run had the same data when it saved the checkpoint that it resumes from."""
        chain = lineage.read(self.run.directory.checkpoints / select.name_of(self.run.step))
        return chain is None or (chain["runs"][-1].get("content") or {}).get(f"data.{name}") == self._dependencies(name)["rows"]

    @torch.no_grad()
    def _compute(self, split: Split, name: str | None) -> RolloutCache:
        """Compute for every row the current policy's log-probs (where the sampler kept none), the reference's, and values."""
        rows, run, module = split.rows, self.run, self.run.module
        valued = self.loss.inputs.head == "value"
        sampled = [rows[row].logps for row in range(len(rows))]
        missing = sum(part is None for part in sampled)
        if not (missing or valued or self.loss.needs_reference):
            return RolloutCache(Ragged.of([part for part in sampled if part is not None]), None, None)
        if missing and name is not None:
            message = "%-10s %d of %d completions have no log-probs: those of the policy at the start are used"
            log.info(message, name, missing, len(rows))
        was_training = module.training
        module.eval()
        rank, world, size = run.accelerator.process_index, run.accelerator.num_processes, self.settings.microbatch_size
        own, most = range(rank, len(rows), world), -(-len(rows) // world)
        computed: list[tuple[int, list[np.ndarray | None]]] = []
        starts = range(0, most, size)
        for start in tqdm(
            starts, desc="reading rollouts", unit="batch", delay=2, leave=False, disable=None if run.main else True
        ):
            run.sync_stop_request()
            if run.stopped_early:
                raise StopRequestedError
            some = list(own[start : start + size])
            items = [rows[row] for row in some or [0]]  # a rank without rows left still takes part in collectives
            batch = pack(self.rows(items)).to(run.accelerator.device)
            with run.accelerator.autocast():
                reference = self._refer(batch) if self.loss.needs_reference else None
                output = module(batch) if missing or valued else None
            parts = [_logps(output), _logps(reference), output.values if isinstance(output, Acted) else None]
            lengths = [int(items[n].completions[0].scored.sum()) for n in range(len(items))]
            for n, row in enumerate(some):
                computed.append((row, [None if part is None else part[n, : lengths[n]].float().cpu().numpy() for part in parts]))
        run.strategy.reshard(module)
        module.train(was_training)
        by_row = dict(gather_object(computed))
        current, reference, values = zip(*(by_row[row] for row in range(len(rows))), strict=True)
        old = [first if first is not None else second for first, second in zip(sampled, current, strict=True)]
        return RolloutCache(
            Ragged.of([part for part in old if part is not None]),
            Ragged.of(reference) if self.loss.needs_reference else None,
            Ragged.of(values) if valued else None,
        )

    # --- a global batch --------------------------------------------------------------------------------------------------

    def _microbatches(self, split: Split, indices: np.ndarray) -> list[MicroBatch]:
        batch, device = self._rollout_batch(split, indices), self.run.accelerator.device
        return [
            replace(microbatch, rollouts=_take(batch, microbatch.positions, device, first=n == 0))
            for n, microbatch in enumerate(super()._microbatches(split, indices))
        ]

    def _rollout_batch(self, split: Split, indices: np.ndarray) -> RolloutBatch:
        """The whole global batch with its advantages; the same on every rank."""
        assert self.loss.advantages is not None, "bind_loss refuses a loss on rollouts without"
        cache = self._cache_of(split)
        width = int(split.rows.scored[indices, 0].max())
        mask = torch.arange(width) < torch.from_numpy(split.rows.scored[indices, 0].astype(np.int64))[:, None]
        old, reference, values = (
            part.rows(indices, width) if part else None for part in (cache.old, cache.reference, cache.values)
        )
        assert old is not None
        rewards = torch.from_numpy(split.rows.labels["reward"][indices])
        groups = torch.from_numpy(split.rows.groups[indices].astype(np.int64))
        sampled = Sampled(rewards, groups, TokenLogps(old, mask), reference, values)
        adapted = {"kl_coefficient": self._controller().value} if self.loss.adapt is not None else {}
        estimates: Estimates = self.loss.advantages(sampled, **adapted)
        if values is not None and estimates.returns is None:
            raise UserError(f"{self.loss.name} has a value head, but its `advantages` returns no returns for it to learn")
        refuse_metrics(estimates.metrics, self.loss.name)
        advantages, returns, metrics = estimates.advantages.float(), estimates.returns, dict(estimates.metrics)
        return RolloutBatch(old, rewards.float(), advantages, reference, returns, values, metrics)

    def _controller(self) -> KLCoefficient:
        controller = self.run.hooks["kl_coefficient"]
        assert isinstance(controller, KLCoefficient)
        return controller

    def _arguments(self, microbatch: MicroBatch) -> list[Any]:
        batch = pack(self.rows(microbatch.items)).to(self.run.accelerator.device)
        with self.run.accelerator.autocast():
            policy = self.inputs(self._policy(batch), microbatch)
        if not self.loss.takes_reference:
            return [policy]
        reference = microbatch.rollouts.reference
        mask = policy.logps.mask
        return [policy, None if reference is None else TokenLogps(reference[:, : mask.shape[1]], mask)]

    def _means(self, loss: Loss, microbatch: MicroBatch) -> dict[str, Mean]:
        of_batch = {name: Mean(mean.total.to(loss.values.device), mean.count.to(loss.values.device))
                    for name, mean in microbatch.rollouts.metrics.items()}  # fmt: skip
        return {**of_batch, **super()._means(loss, microbatch)}


def _take(batch: RolloutBatch, positions: np.ndarray, device: torch.device, *, first: bool) -> RolloutBatch:
    """The rows at `positions`, on `device`; the metrics of the whole batch go with its `first` micro-batch."""
    rows = torch.from_numpy(positions)
    some = _over_time(batch, lambda part: part[rows].to(device))
    return replace(some, rewards=batch.rewards[rows].to(device), metrics=batch.metrics if first else {})


def _over_time(batch: RolloutBatch, change: Callable[[Tensor], Tensor]) -> RolloutBatch:
    """Apply `change` to every tensor of shape (rows, time)."""

    def optional(part: Tensor | None) -> Tensor | None:
        return None if part is None else change(part)

    return replace(
        batch, old=change(batch.old), advantages=change(batch.advantages), reference=optional(batch.reference),
        returns=optional(batch.returns), values=optional(batch.values),
    )  # fmt: skip


def _logps(output: Any) -> Tensor | None:
    output = output.logps if isinstance(output, Acted) else output
    return output.values if isinstance(output, TokenLogps) else None
