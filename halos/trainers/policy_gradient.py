"""Rollouts: completions that were sampled and scored, and what their rewards say of each of their tokens."""

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
from halos.trainers.deal import Chunk, Split
from halos.trainers.known import Known, Per, load, save
from halos.types import Acted, Estimates, Loss, Mean, RolloutBatch, RolloutInput, Sampled, TokenLogps

log = logging.getLogger(__name__)

NAME = "rollouts"  # the directory of a run that holds what was known of its rollouts before the first step


class StopRequestedError(Exception):
    """A signal came while rows were read, on every process alike: they are read again when the run goes on."""


class PolicyGradientTrainer(Trainer):
    """For losses on rollouts, whose first parameter is a RolloutInput.

    Log-probs under the policy that sampled, under the reference, and old values do not change while a data set is trained
    on: they are computed before the first step and kept in the run's directory, and every process holds all of them. So
    advantages are of whole groups and whole global batches, however those are dealt out, without a word between processes.
    """

    @cached_property
    def _of_data(self) -> dict[str, Known]:
        """By split, as far as they were asked for."""
        return {}

    def inputs(self, output: TokenLogps | Acted, chunk: Chunk) -> RolloutInput:
        batch: RolloutBatch = chunk.given
        logps = output.logps if isinstance(output, Acted) else output
        width = logps.values.shape[1]
        inputs = self.loss.inputs
        assert issubclass(inputs, RolloutInput), "its input type names this trainer"
        return inputs.of_rollouts(output, _over_time(batch, lambda part: part[:, :width]))

    def refuse_lost(self) -> None:
        for name, split in self._data_sets():
            self._is_there(split, name)

    def prepare(self) -> None:
        try:
            for _, split in self._data_sets():
                self._known(split)
        except StopRequestedError:
            return  # the loop sees it too
        if isinstance(self.train.rows, Dataset):
            self.reference = None  # all that it had to say is known

    def step(self, indices: np.ndarray) -> Totals:
        totals = super().step(indices)
        if self.loss.adapt is not None and "kl" in totals:
            kl, count = totals["kl"]
            controller = self._controller()
            totals = {**totals, "kl_coefficient": (controller.value, 1.0)}
            controller.value = self.loss.adapt(controller.value, kl / count, len(indices))
        return totals

    # --- what is known of rows before the policy moves -------------------------------------------------------------------

    def _data_sets(self) -> list[tuple[str, Split]]:
        named = (("train", self.train), ("eval", self.held_out))
        return [(name, split) for name, split in named if split is not None and isinstance(split.rows, Dataset)]

    def _known(self, split: Split) -> Known:
        """Of a data set computed once, or read from the run's directory, where the first attempt has put it."""
        if not isinstance(split.rows, Dataset):
            return self._find_out(split, None)
        name = "train" if split is self.train else "eval"
        if name not in self._of_data:
            self._of_data[name] = self._read_or_find_out(split, name)
        return self._of_data[name]

    def _read_or_find_out(self, split: Split, name: str) -> Known:
        place = self.run.directory.path / NAME / name
        if not self._is_there(split, name):
            if self.run.main and self.run.step:
                log.warning("%s: rows or settings are others now: read anew, with the policy of step %d", place, self.run.step)
            known = self._find_out(split, name)
            facts = {"rows": len(split.rows), "stands_on": self._stands_on(name)}
            with staged(place, main=self.run.main, gather=gather_object, facts=facts) as hidden:
                if self.run.main:
                    save(hidden, known)
        return load(place)

    def _is_there(self, split: Split, name: str) -> bool:
        """Whether the run's directory holds what is to be known of these rows. Raises UserError where it has held it, and the
        policy that it tells of has moved on since."""
        place, there, problem = self.run.directory.path / NAME / name, False, None
        if self.run.main:
            listing = manifest.read(place) if place.is_dir() and not manifest.verify(place) else None
            if isinstance(listing, dict):
                mine = self._stands_on(name)  # of which an older version has noted nothing
                there = listing.get("rows") == len(split.rows) and listing.get("stands_on", mine) == mine
            elif self.run.step and self._stood_on(name):
                problem = f"{place} is damaged or gone, and the policy that it tells of has moved on since: begin anew"
        there, problem = gather_object([(there, problem)])[0]
        if problem is not None:
            raise UserError(problem)
        return there

    def _stands_on(self, name: str) -> dict[str, Any]:
        """What log-probs and values of rows depend on, besides the policy's own steps; on the first process."""
        config, hashes = self.run.config, self.run.content.hashes if self.run.content is not None else {}
        models = ("model.weights", "reference.weights", "peft.init_from", "model.chat_template")
        knobs = {"temperature": config.train.temperature, "adapter": config.reference.adapter}
        asked = {"reference": self.loss.needs_reference, "values": self.loss.inputs.head == "value"}
        return {"rows": hashes.get(f"data.{name}"), **{key: hashes.get(key) for key in models}, **knobs, **asked}

    def _stood_on(self, name: str) -> bool:
        """Whether the run had these rows when the checkpoint was saved that it goes on from."""
        chain = lineage.read(self.run.directory.checkpoints / select.name_of(self.run.step))
        return chain is None or (chain["runs"][-1].get("content") or {}).get(f"data.{name}") == self._stands_on(name)["rows"]

    @torch.no_grad()
    def _find_out(self, split: Split, name: str | None) -> Known:
        """Log-probs of the policy as it is (where the sampler kept none) and of the reference, and values: of every row."""
        rows, run, module = split.rows, self.run, self.run.module
        valued = self.loss.inputs.head == "value"
        own = [rows[row].logps for row in range(len(rows))]
        missing = sum(part is None for part in own)
        if not (missing or valued or self.loss.needs_reference):
            return Known(Per.of([part for part in own if part is not None]), None, None)
        if missing and name is not None:
            log.info("%-10s %d of %d completions came without log-probs: the policy's at the start stand for them", name, missing,
                     len(rows))  # fmt: skip
        was_training = module.training
        module.eval()
        rank, world, size = run.accelerator.process_index, run.accelerator.num_processes, self.settings.microbatch_size
        mine, most = range(rank, len(rows), world), -(-len(rows) // world)
        found: list[tuple[int, list[np.ndarray | None]]] = []
        starts = range(0, most, size)
        for start in tqdm(
            starts, desc="reading rollouts", unit="batch", delay=2, leave=False, disable=None if run.main else True
        ):
            run.sync_stop_request()
            if run.stopped_early:
                raise StopRequestedError
            some = list(mine[start : start + size])
            items = [rows[row] for row in some or [0]]  # a process without rows joins in all the same
            batch = pack(self.rows(items)).to(run.accelerator.device)
            with run.accelerator.autocast():
                reference = self._refer(batch) if self.loss.needs_reference else None
                output = module(batch) if missing or valued else None
            parts = [_logps(output), _logps(reference), output.values if isinstance(output, Acted) else None]
            lengths = [int(items[n].completions[0].scored.sum()) for n in range(len(items))]
            for n, row in enumerate(some):
                found.append((row, [None if part is None else part[n, : lengths[n]].float().cpu().numpy() for part in parts]))
        run.strategy.reshard(module)
        module.train(was_training)
        everything = dict(gather_object(found))
        old, reference, values = zip(*(everything[row] for row in range(len(rows))), strict=True)
        kept = [mine if mine is not None else computed for mine, computed in zip(own, old, strict=True)]
        return Known(
            Per.of([part for part in kept if part is not None]),
            Per.of(reference) if self.loss.needs_reference else None,
            Per.of(values) if valued else None,
        )

    # --- a global batch --------------------------------------------------------------------------------------------------

    def _deal(self, split: Split, indices: np.ndarray) -> list[Chunk]:
        batch, device = self._estimated(split, indices), self.run.accelerator.device
        chunks = super()._deal(split, indices)
        return [replace(chunk, given=_take(batch, chunk.places, device, first=n == 0)) for n, chunk in enumerate(chunks)]

    def _estimated(self, split: Split, indices: np.ndarray) -> RolloutBatch:
        """The whole global batch with its advantages; the same on every process."""
        assert self.loss.advantages is not None, "bind_loss lets no loss on rollouts through without"
        known = self._known(split)
        width = int(split.rows.scored[indices, 0].max())
        mask = torch.arange(width) < torch.from_numpy(split.rows.scored[indices, 0].astype(np.int64))[:, None]
        old, reference, values = (
            part.rows(indices, width) if part else None for part in (known.old, known.reference, known.values)
        )
        assert old is not None
        rewards = torch.from_numpy(split.rows.labels["reward"][indices])
        groups = torch.from_numpy(split.rows.groups[indices].astype(np.int64))
        sampled = Sampled(rewards, groups, TokenLogps(old, mask), reference, values)
        controlled = {"kl_coefficient": self._controller().value} if self.loss.adapt is not None else {}
        estimates: Estimates = self.loss.advantages(sampled, **controlled)
        if values is not None and estimates.returns is None:
            raise UserError(f"{self.loss.name} has a value head, but its `advantages` gives no returns that it could learn")
        advantages, returns, metrics = estimates.advantages.float(), estimates.returns, dict(estimates.metrics)
        return RolloutBatch(old, rewards.float(), advantages, reference, returns, values, metrics)

    def _controller(self) -> KLCoefficient:
        controller = self.run.hooks["kl_coefficient"]
        assert isinstance(controller, KLCoefficient)
        return controller

    def _arguments(self, chunk: Chunk) -> list[Any]:
        batch = pack(self.rows(chunk.items)).to(self.run.accelerator.device)
        with self.run.accelerator.autocast():
            policy = self.inputs(self._policy(batch), chunk)
        if not self.loss.takes_reference:
            return [policy]
        reference = chunk.given.reference
        mask = policy.logps.mask
        return [policy, None if reference is None else TokenLogps(reference[:, : mask.shape[1]], mask)]

    def _means(self, loss: Loss, chunk: Chunk) -> dict[str, Mean]:
        given = {name: Mean(mean.total.to(loss.values.device), mean.count.to(loss.values.device))
                 for name, mean in chunk.given.metrics.items()}  # fmt: skip
        return {**given, **super()._means(loss, chunk)}


def _take(batch: RolloutBatch, places: np.ndarray, device: torch.device, *, first: bool) -> RolloutBatch:
    """Some rows, on `device`; the batch's own metrics go with the first of them."""
    rows = torch.from_numpy(places)
    some = _over_time(batch, lambda part: part[rows].to(device))
    return replace(some, rewards=batch.rewards[rows].to(device), metrics=batch.metrics if first else {})


def _over_time(batch: RolloutBatch, change: Callable[[Tensor], Tensor]) -> RolloutBatch:
    """With everything that is (rows, time) as `change` gives it back."""

    def optional(part: Tensor | None) -> Tensor | None:
        return None if part is None else change(part)

    return replace(
        batch, old=change(batch.old), advantages=change(batch.advantages), reference=optional(batch.reference),
        returns=optional(batch.returns), values=optional(batch.values),
    )  # fmt: skip


def _logps(output: Any) -> Tensor | None:
    output = output.logps if isinstance(output, Acted) else output
    return output.values if isinstance(output, TokenLogps) else None
