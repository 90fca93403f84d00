"""Policy gradient losses on rollouts: caches old and reference log-probs, and computes advantages of global batches."""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halos.data.dataset import Dataset
from halos.errors import UserError
from halos.hooks.entropy import EntropyCoefficient
from halos.hooks.kl import KLCoefficient
from halos.metrics import Meter
from halos.rollout.rescore import WARNED
from halos.trainers import mismatch
from halos.trainers.base import Parts, Totals, Trainer
from halos.trainers.loss_checks import refuse_metrics
from halos.trainers.microbatches import MicroBatch, Split
from halos.trainers.mismatch import Correction
from halos.trainers.reference import StopRequestedError
from halos.trainers.rollout_cache import RolloutCache
from halos.trainers.rollout_pass import RolloutPass
from halos.transfer import to_device
from halos.types import Acted, Estimates, Loss, Mean, RolloutBatch, RolloutInput, Sampled, TokenLogps

log = logging.getLogger(__name__)

CLIPS_ROUNDING = "old/clip_fraction"  # metric
IDLE_BATCHES = 3  # in a row without any advantage, after which a warning says so
LARGEST_SHARE = 0.01  # of tokens that the clip may act on by rounding alone, without a warning


class PolicyGradientTrainer(Trainer):
    """For losses on rollouts, whose first parameter is a RolloutInput.

    Old log-probs are this trainer's own. On the first pass over a batch, while the policy is still the one that sampled, they are
    those of the forward pass that learns, so that every ratio is exactly 1. Those for later passes, the reference's log-probs and
    old values do not change meanwhile: they are computed beforehand, of a data set once in a run (`RolloutPass`), and every rank
    holds all of them. So advantages are computed over whole groups and whole global batches, however these are sharded, without
    communication. The sampler's log-probs serve only to weigh the advantages (`Correction`) and to measure the mismatch.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._measured: dict[str, Mean] = {}  # of the last micro-batch
        self._largest: Tensor | None = None  # mismatch of a token in this step, on this rank
        self._warned = False
        self._mismatched = False  # a warning said so
        self._idle = 0  # batches in a row without any advantage
        self._live: tuple[RolloutCache, RolloutBatch] | None = None  # the batch of a live loop with its advantages

    @cached_property
    def rollouts(self) -> RolloutPass:
        return RolloutPass(self, {name: split for name, split in (("train", self.train), ("eval", self.eval_data)) if split})

    @cached_property
    def correction(self) -> Correction:
        return Correction.of(self.settings, self.loss, same_arithmetic=self.train.rows.sampled_here)

    def refuse_lost_cache(self) -> None:
        self.rollouts.refuse_lost()

    def prepare(self) -> None:
        self._warn_of_idle_correction()
        with suppress(StopRequestedError):  # the loop stops for the same request
            for split in self.rollouts.splits.values():
                self.rollouts.of(split)
            if isinstance(self.train.rows, Dataset):
                self.reference = None  # its log-probs are all cached: free its memory

    def step(self, indices: np.ndarray) -> Totals:
        self._largest = None
        totals = mismatch.with_largest(super().step(indices))
        if "mismatch/mean" in totals:
            self._warn_of_mismatch(*totals["mismatch/mean"])
        self._warn_of_rounding(totals)
        if self.loss.adapt is not None and "kl" in totals:
            kl, count = totals["kl"]
            controller = self._controller()
            totals = {**totals, "kl_coefficient": (controller.value, 1.0)}
            items = len(indices) if isinstance(self.train.rows, Dataset) else len(self.train.rows)
            controller.value = self.loss.adapt(controller.value, kl / count, items)
        return self._adapt_entropy(totals)

    def adapted(self) -> Mapping[str, Any]:
        bonus = self.run.hooks.get("entropy_coefficient")
        if not isinstance(bonus, EntropyCoefficient):
            return {}
        return {"entropy_coefficient": bonus.applied(self.loss.settings["entropy_target"])}

    def _adapt_entropy(self, totals: Totals) -> Totals:
        """A step's totals with the coefficient that it used, where that follows a target; it is changed for the next step."""
        bonus = self.run.hooks.get("entropy_coefficient")
        if not isinstance(bonus, EntropyCoefficient) or self.loss.adapt_entropy is None or "entropy" not in totals:
            return totals
        used, (total, count) = self.adapted()["entropy_coefficient"], totals["entropy"]
        bonus.entropy = total / count
        bonus.value = self.loss.adapt_entropy(bonus.value, bonus.entropy)
        return {**totals, "entropy_coefficient": (used, 1.0)}

    def _reduce(self, meter: Meter, norm: Tensor) -> dict[str, tuple[float, float]]:
        if self._largest is not None:
            meter.add({mismatch.largest_of_rank(self.run.accelerator.process_index): Mean.of(self._largest)})
        return super()._reduce(meter, norm)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return {**super().derived(means), **mismatch.derived(means)}

    def _warn_of_idle_correction(self) -> None:
        rows, kind = self.train.rows, self.settings.correction
        if kind in ("auto", "none") or not isinstance(rows, Dataset) or rows.has_logps.all() or not self.run.main:
            return
        log.warning(
            "train.correction=%s corrects nothing of %d of %d rows of data.train, which have no log-probs of their sampler: these"
            " are `logps` beside `output_ids` and the `vocabulary` of this tokenizer", kind, (~rows.has_logps).sum(), len(rows),
        )  # fmt: skip

    def _warn_of_mismatch(self, total: float, count: float) -> None:
        if not self._mismatched and self.run.main and total > WARNED * count:
            self._mismatched = True
            log.warning(
                "the sampler's log-probs are %.2g nats a token from this trainer's own on average (mismatch/mean), which is more"
                " than rounding (up to %g): it sampled from another model or other weights, at another temperature than"
                " train.temperature=%g, in a coarser dtype, or it returns log-probs before temperature or after top_p or top_k",
                total / count, WARNED, self.run.config.train.temperature,
            )  # fmt: skip

    # --- a global batch --------------------------------------------------------------------------------------------------

    def _microbatches(self, split: Split, indices: np.ndarray) -> list[MicroBatch]:
        batch, device = self._rollout_batch(split, indices), self.run.accelerator.device
        return [
            replace(microbatch, rollouts=_take(batch, microbatch.positions, device, first=n == 0))
            for n, microbatch in enumerate(super()._microbatches(split, indices))
        ]

    def _rollout_batch(self, split: Split, indices: np.ndarray) -> RolloutBatch:
        """A global batch with its advantages; the same on every rank. Those of a live batch are of all its minibatches."""
        cache, rows = self.rollouts.of(split), split.rows
        first = split is self.train and cache.step == self.run.step
        if isinstance(rows, Dataset):
            adapted = {"kl_coefficient": self._controller().value} if self.loss.adapt is not None else {}
            return replace(self._estimated(split, cache, indices, adapted), first_pass=first)
        whole = self._live_batch(split, rows)
        return replace(_take(whole, indices, torch.device("cpu"), first=first), first_pass=first)

    def _live_batch(self, split: Split, rows: Any) -> RolloutBatch:
        """All of a live batch, computed once."""
        adapted = self._coefficient_of(rows)
        if self._live is None or self._live[0] is not rows.cache:
            self._live = rows.cache, self._estimated(split, rows.cache, np.arange(len(rows)), adapted)
        return self._live[1]

    def _coefficient_of(self, rows: Any) -> dict[str, float]:
        """The adaptive KL coefficient for a live batch: that of its first step, whenever this run resumes."""
        if self.loss.adapt is None:
            return {}
        if rows.cache.kl_coefficient is None:
            rows.cache = replace(rows.cache, kl_coefficient=self._controller().value)
        return {"kl_coefficient": rows.cache.kl_coefficient}

    def _estimated(self, split: Split, cache: RolloutCache, indices: np.ndarray, adapted: Mapping[str, float]) -> RolloutBatch:
        assert self.loss.advantages is not None, "bind_loss refuses a loss on rollouts without"
        width = max(1, int(split.rows.scored[indices, 0].max()))  # of samples that were cut nothing may be learned
        mask = torch.arange(width) < torch.from_numpy(split.rows.scored[indices, 0].astype(np.int64))[:, None]
        own, given, reference, values = (
            part.rows(indices, width) if part else None for part in (cache.old, cache.sampled, cache.reference, cache.values)
        )
        old = own if own is not None else given
        assert old is not None, "where the sampler kept no log-probs, the trainer computes them"
        rewards = torch.from_numpy(split.rows.labels["reward"][indices])
        if self.loss.check_rewards is not None and (complaint := self.loss.check_rewards(split.rows.labels["reward"][indices])):
            raise UserError(complaint)
        groups = torch.from_numpy(split.rows.groups[indices].astype(np.int64))
        sampled = Sampled(rewards, groups, TokenLogps(old, mask), reference, values)
        estimates: Estimates = self.loss.advantages(sampled, **adapted)
        if values is not None and estimates.returns is None:
            raise UserError(f"{self.loss.name} has a value head, but its `advantages` returns no returns for it to learn")
        refuse_metrics(estimates.metrics, self.loss.name)
        advantages, returns, metrics = estimates.advantages.float(), estimates.returns, dict(estimates.metrics)
        if split is self.train:
            self._warn_of_idle_batches(advantages)
        known = (old, given, rewards.float(), advantages, reference, returns, values, metrics)
        return RolloutBatch(*known, old_is_own=own is not None)

    def _warn_of_idle_batches(self, advantages: Tensor) -> None:
        self._idle = 0 if advantages.any() else self._idle + 1
        if self._idle == IDLE_BATCHES and self.run.main:
            log.warning(
                "in %d batches no sample was better than the others of its prompt, so that nothing was learned: more samples of"
                " each prompt, a higher temperature, prompts of another difficulty, or rewards with more than two values",
                IDLE_BATCHES,
            )

    def _controller(self) -> KLCoefficient:
        controller = self.run.hooks["kl_coefficient"]
        assert isinstance(controller, KLCoefficient)
        return controller

    def _arguments(self, microbatch: MicroBatch) -> list[Any]:
        output = self._read(microbatch)
        policy, reference = self.inputs(output, microbatch), microbatch.rollouts.reference
        mask, more = policy.logps.mask, list[TokenLogps | None]()
        if self.loss.takes_reference:
            more = [None if reference is None else TokenLogps(reference[:, : mask.shape[1]], mask)]
        if (clipped := self._clipped_by_rounding(output, microbatch.rollouts, more)) is not None:
            self._measured[CLIPS_ROUNDING] = clipped
        return [policy, *more]

    def inputs(self, output: TokenLogps | Acted, microbatch: MicroBatch) -> RolloutInput:
        logps = output.logps if isinstance(output, Acted) else output
        width, kind = logps.values.shape[1], self.loss.inputs
        assert issubclass(kind, RolloutInput), "its input type names this trainer"
        batch = _over_time(microbatch.rollouts, lambda part: part[:, :width])
        batch, self._measured = self._with_old(batch, logps)
        if batch.sampled is not None:
            advantages, of_sampler = self.correction.weigh(batch.advantages, batch.old, batch.sampled, logps.mask)
            if microbatch.weight:
                most = mismatch.largest(batch.old, batch.sampled, logps.mask)
                self._largest = most if self._largest is None else torch.maximum(self._largest, most)
            batch, self._measured = replace(batch, advantages=advantages), self._measured | of_sampler
        return kind.of_rollouts(output, batch)

    def _with_old(self, batch: RolloutBatch, logps: TokenLogps) -> tuple[RolloutBatch, dict[str, Mean]]:
        """The batch with its old log-probs; on the first pass also how far those computed beforehand are from them."""
        if not batch.first_pass:
            return batch, {}
        own = logps.values.detach()
        drift = {} if not batch.old_is_own else {"old/drift": Mean.of((own - batch.old).abs(), logps.mask)}
        return replace(batch, old=own), drift

    @torch.no_grad()
    def _clipped_by_rounding(self, output: Any, batch: RolloutBatch, more: list[TokenLogps | None]) -> Mean | None:
        """The fraction of tokens that the clip would act on if this pass took the old log-probs that were computed beforehand,
        though the policy has not moved: what later passes will mistake for a movement. None where there are no later passes."""
        rows: Any = self.train.rows
        is_last = not isinstance(rows, Dataset) and rows.passes == 1
        if not (batch.first_pass and batch.old_is_own) or is_last or self.loss.statistics is not None:
            return None
        width = (output.logps if isinstance(output, Acted) else output).mask.shape[1]
        given = self.loss.inputs.of_rollouts(output, _over_time(batch, lambda part: part[:, :width]))  # type: ignore[attr-defined]
        return self.loss.function(given, *more).metrics.get("clip_fraction")

    def _warn_of_rounding(self, totals: Totals) -> None:
        clipped, count = totals.get(CLIPS_ROUNDING, (0.0, 1.0))
        if self._warned or clipped <= LARGEST_SHARE * count:
            return
        self._warned = True
        drift, tokens = totals["old/drift"]
        if self.run.main:
            log.warning(
                "two passes over the same weights give log-probs that differ by %.1g nats, and loss.clip_low and clip_high take"
                " that for a movement of the policy at %.0f%% of the tokens: a wider clip, or train.precision=float32",
                drift / tokens, 100 * clipped / count,
            )  # fmt: skip

    def _means(self, loss: Loss, microbatch: MicroBatch) -> dict[str, Mean]:
        return {**microbatch.rollouts.metrics, **self._measured, **super()._means(loss, microbatch)}


def _take(batch: RolloutBatch, positions: np.ndarray, device: torch.device, *, first: bool) -> RolloutBatch:
    """The rows at `positions`, on `device`; the metrics of the whole batch go with its `first` micro-batch."""
    rows = torch.from_numpy(positions)
    some = _over_time(batch, lambda part: to_device(part[rows], device))
    metrics = _metrics_on(batch.metrics, device) if first else {}
    return replace(some, rewards=to_device(batch.rewards[rows], device), metrics=metrics)


def _metrics_on(metrics: Mapping[str, Mean], device: torch.device) -> Mapping[str, Mean]:
    """Metrics that were computed on the host, brought to a device by one copy."""
    if not metrics:
        return {}
    totals, counts = ([getattr(mean, part).double() for mean in metrics.values()] for part in ("total", "count"))
    table = to_device(torch.stack([torch.stack(totals), torch.stack(counts)]), device)
    return {name: Mean(*pair) for name, pair in zip(metrics, table.unbind(1), strict=True)}


def _over_time(batch: RolloutBatch, change: Callable[[Tensor], Tensor]) -> RolloutBatch:
    """Apply `change` to every tensor of shape (rows, time)."""

    def optional(part: Tensor | None) -> Tensor | None:
        return None if part is None else change(part)

    return replace(
        batch, old=change(batch.old), sampled=optional(batch.sampled), advantages=change(batch.advantages),
        reference=optional(batch.reference), returns=optional(batch.returns), values=optional(batch.values),
    )  # fmt: skip
