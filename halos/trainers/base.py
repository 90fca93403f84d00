"""The training loop. A step is the exact mean over every item of the global batch, however that was sharded."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from halos.checkpoint.checkpointer import Checkpointer
from halos.config.bind import LossSpec
from halos.data.dataset import Dataset
from halos.data.stream import StreamRows
from halos.distributed.agreement import from_rank_0
from halos.errors import UserError
from halos.examples import Item
from halos.hooks.base import Run, call_on_eval, states_of
from halos.logps.working_weights import kept_casts
from halos.metrics import Meter, Window
from halos.rollout.scores import ScoringError
from halos.trainers import teacher_rows
from halos.trainers.evaluation import EvaluatedObjective
from halos.trainers.guard import Contribution, Guard, propagate_nonfinite
from halos.trainers.memory import peak_mb
from halos.trainers.microbatches import MicroBatch, Split
from halos.trainers.reference import ReferenceCache, ReferenceLogps, StopRequestedError
from halos.types import Mean

log = logging.getLogger(__name__)

Totals = Mapping[str, tuple[float, float]]


class Batches(Protocol):
    """The order of the data: row indices of each global batch."""

    def batch(self, number: int) -> np.ndarray: ...


GenerationEvaluation = Callable[[], Mapping[str, float]]  # returns metrics; every rank calls it, and gets the same


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that a trainer is assembled from."""

    run: Run
    loss: LossSpec
    checkpointer: Checkpointer
    train: Split
    eval_data: Split | None
    order: Batches
    reference: nn.Module | None
    generation_evaluation: GenerationEvaluation | None  # of a live loop, instead of the loss over evaluation data
    reference_cache: ReferenceCache | None = None  # in the place of a reference that computes at every step


class Trainer(EvaluatedObjective):
    """Owns the loop. A subclass may be chosen by `trainer._target_`; its keyword-only parameters are its keys."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.run, parts.loss, reference=parts.reference)
        self.checkpointer = parts.checkpointer
        self.train, self.eval_data, self.order = parts.train, parts.eval_data, parts.order
        self.generation_evaluation = parts.generation_evaluation
        self.packs_ahead &= isinstance(self.train.rows, Dataset | StreamRows)  # the next batch of a live loop is not known yet
        self._following: np.ndarray | None = None  # the batch of the next step
        splits = {name: split for name, split in (("train", self.train), ("eval", self.eval_data)) if split}
        if parts.reference_cache is not None:
            self.reference_logps = ReferenceLogps(self, splits, parts.reference_cache)
        self.guard = Guard(self.run, self._output, self._rows_of)
        self._meter = Meter()  # of a step; it knows the metrics of earlier ones
        self._logged_at, self._logged_tokens, self._idle = 0.0, 0, 0.0  # as of the last logged step

    def refuse_lost_cache(self) -> None:
        """Raises UserError where files that a resume needs besides the checkpoint are damaged or missing; changes nothing."""

    def prepare(self) -> None:
        """Compute what must be known about the data before the first step."""

    def prepare_reference(self) -> None:
        """Compute the reference's log-probs where they are kept. Before any hook, which might change the weights: at the start of
        a run the policy is its own reference."""
        if self.reference_logps is not None:
            with suppress(StopRequestedError):  # the loop stops for the same request
                self.reference_logps.prepare()
                if self.run.config.reference.export is not None:
                    self._export(self.reference_logps)

    def _export(self, known: ReferenceLogps) -> None:
        """Write rows with what the teacher says of them."""
        config, tokenizer = self.run.config, self.run.tokenizer
        splits = {name: split for name, split in (("train", self.train), ("eval", self.eval_data)) if split}
        from_rank_0(self.run.accelerator, lambda: teacher_rows.export(config, tokenizer, splits, known))

    # --- the loop --------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last step, or until a hook or a signal stops the run. Only a run that finished writes `FINAL`."""
        with self.run.resources, closing(self._prepared), self._saved_without_scores():
            self._fit()

    def _fit(self) -> None:
        run, checkpointer = self.run, self.checkpointer
        self.guard.refuse_initial_weights()
        checkpointer.start()
        self.prepare_reference()
        run.call_hooks(lambda hook: hook.on_start(run))
        if not run.stop:
            self.prepare()
        if not run.stop and self._evaluation_due():
            self.evaluate()
        states_of(run.hooks)  # refuses one that no checkpoint could keep
        self._start_window()
        first = run.step + 1
        while run.step < run.total_steps and not run.stop:
            self._log(self._one_step())
            if run.step == first:
                states_of(run.hooks)  # again, since the first save may be hours away
            if run.step == run.total_steps or run.stop:
                break
            if self._evaluation_due():
                self.evaluate()
            if checkpointer.due() and not run.stop:
                checkpointer.save(final=False)
        run.refuse_lone_stop()
        if not run.stopped_early and run.last_eval.get("step") != run.step:
            self.evaluate()
        checkpointer.finish_save()
        if run.failed or (not run.stopped_early and self.guard.refuse_final()):
            return  # earlier checkpoints stay
        checkpointer.finish()

    @contextmanager
    def _saved_without_scores(self) -> Iterator[None]:
        """Save a checkpoint before the run ends where samples get no scores: the steps until here are sound."""
        try:
            yield
        except ScoringError:
            step, checkpointer = self.run.step, self.checkpointer
            checkpointer.finish_save()
            if step > checkpointer.saved:
                checkpointer.save(final=False)
            checkpointer.finish_save()
            if step == checkpointer.saved > 0:  # not where the disk is full
                log.warning("step %d is saved, from which the run resumes once samples get scores", step)
            raise

    def _one_step(self) -> Totals:
        """Raises UserError where a subclass's `step` does not do what the loop relies on."""
        run, before = self.run, self.run.step
        indices, self._following = self.order.batch(before), None
        if self.packs_ahead and before + 1 < run.total_steps:
            self._following = self.order.batch(before + 1)
        totals = self.step(indices)
        if not isinstance(totals, Mapping) or run.step != before + 1:
            got = f"{type(totals).__name__}" if not isinstance(totals, Mapping) else f"with run.step={run.step}, from {before}"
            raise UserError(f"{type(self).__name__}.step returned {got}: return what super().step(indices) returns, called once")
        return totals

    def step(self, indices: np.ndarray) -> Totals:
        """One optimizer step over a global batch: the sum of its losses over the loss's denominator in the whole batch.

        The host waits for the device once, for the gradient norm and all metrics. The norm decides whether the optimizer steps;
        under DeepSpeed `clip` has decided by the same norm, and stepped. A skipped step returns no totals.
        """
        run, strategy = self.run, self.run.strategy
        run.learning_rates.set(run.step)
        self.modes.train()
        microbatches = self._microbatches(self.train, indices)
        with kept_casts(self.settings.working_weights == "step"):
            meter, parts = self._backward(microbatches, indices)
        self._move_reference()
        totals = self._reduce(meter, strategy.clip(run.module, self.settings.max_grad_norm))
        norm = totals["grad_norm"][0]
        if is_finite := self.guard.passes(norm, microbatches[0].items):
            strategy.step(run.optimizer)
        strategy.zero_grad(run.optimizer)
        run.step += 1
        run.examples += len(indices)
        run.tokens += int(self.train.rows.lengths[indices].sum())
        run.stop_if_requested(totals.pop("stop")[0] > 0)
        if totals.pop("written", (0.0,))[0] == run.accelerator.num_processes:
            self.checkpointer.finish_save()
        if is_finite:
            self._advance_state(totals)
        else:
            window = Window()
            window.add(totals)
            self.guard.skip(self.train, parts, loss=window.means().get("loss", math.nan), norm=norm)
        return totals if is_finite else {}

    def _backward(self, microbatches: list[MicroBatch], indices: np.ndarray) -> tuple[Meter, list[Contribution]]:
        """Accumulate the gradients of a global batch; return its metrics and the losses of its rows."""
        run, meter, parts = self.run, self._meter, list[Contribution]()
        world, denominators = run.accelerator.num_processes, self._denominators(self.train, indices)
        statistics, routing = self._statistics(microbatches, len(indices)), self._routing(microbatches)
        for number, microbatch in enumerate(self._in_turn(microbatches), 1):
            if (last := number == len(microbatches)) and self._following is not None:
                self._prepare(self.train, self._following, run.step + 1)
            with nullcontext() if last else run.strategy.accumulate(run.module):
                loss = self._loss(microbatch, statistics, len(indices))
                means = self._means(loss, microbatch)
                # gradients are averaged over ranks: scale the sums back up before dividing by the global denominators
                total = torch.stack([part.values.sum() * microbatch.weight * world / denominators[part.per]
                                     for part in loss.terms.values()]).sum()  # fmt: skip
                if (balance := self._balance(microbatch, routing)) is not None and self.router is not None:
                    total = total + self.router.weight * balance.total * microbatch.weight * world
                    means["router_aux_loss"] = balance
                run.strategy.backward(run.module, propagate_nonfinite(total, self.outputs), last=last)
            meter.add(means, microbatch.weight)
            if microbatch.weight:
                parts.append(Contribution(indices[microbatch.positions], microbatch.positions, loss.values.detach()))
        return meter, parts

    def _reduce(self, meter: Meter, norm: Tensor) -> dict[str, tuple[float, float]]:
        """A step's totals over all ranks, in one collective: metrics, gradient norm, and flags on which ranks must agree."""
        run, device, written = self.run, self.run.accelerator.device, self.checkpointer.written
        flags = {"stop": bool(run.stop_requested), **({"written": written} if written is not None else {})}
        meter.add({name: Mean.of(torch.full((), float(flag), device=device)) for name, flag in flags.items()})
        meter.add({"grad_norm": Mean.of(norm.to(device))})
        totals = meter.reduce(lambda table: run.accelerator.reduce(table, reduction="sum"), gather_object)
        total, count = totals["grad_norm"]  # every rank added the same norm
        return {**totals, "grad_norm": (total / count, 1.0)}

    def _log(self, totals: Totals) -> None:
        """Add a step's totals to the window; every `log_every` steps log its means."""
        run, row = self.run, {}
        run.window.add(totals)
        if run.step % self.settings.log_every == 0 or run.step == run.total_steps:
            means = {"loss": math.nan, **run.window.means()}  # nan where every step of the window was skipped
            seconds = time.perf_counter() - self._logged_at - (self.checkpointer.seconds - self._idle)
            row = {"step": run.step, "split": "train", **means, **self.derived(means)}
            row |= {"lr": run.optimizer.param_groups[0]["lr"], "examples": run.examples, "tokens": run.tokens}
            row |= {"skipped_steps": run.skipped_steps}
            row |= {"seconds": round(seconds, 4), "tokens_per_second": round((run.tokens - self._logged_tokens) / seconds, 1)}
            row |= {"peak_memory_mb": peak_mb(run.accelerator.device), **self._seconds_by_name(seconds)}
            run.last_train, run.window = row, Window()
            self._start_window()
        self.checkpointer.note_good()
        run.call_hooks(lambda hook: hook.on_step(run, row))

    def _start_window(self) -> None:
        """Start counting time and tokens for the next logged line; time in saves and evaluations is not counted."""
        self._logged_at, self._logged_tokens, self._idle = time.perf_counter(), self.run.tokens, self.checkpointer.seconds
        self.run.seconds_outside_training = dict.fromkeys(self.run.seconds_outside_training, 0.0)

    def _seconds_by_name(self, seconds: float) -> dict[str, float]:
        """The seconds of a logged line by what they were spent on, which `train` completes; empty where that is all."""
        spent = self.run.seconds_outside_training
        parts = {**spent, "train": seconds - sum(spent.values())} if spent else {}
        return {f"seconds/{name}": round(part, 4) for name, part in parts.items()}

    # --- evaluation ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> None:
        """Evaluate: the same loss over all evaluation data, or in a live loop the generation evaluation."""
        run, began = self.run, time.perf_counter()
        if self.eval_data is None and self.generation_evaluation is None:
            return
        run.module.eval()
        means = self.generation_evaluation() if self.generation_evaluation else self._eval_means()
        if run.stopped_early:
            return  # the evaluation is repeated on resume
        seconds, first = time.perf_counter() - began, not run.last_eval
        row = {"step": run.step, "split": "eval", **means, "seconds": round(seconds, 3)}
        run.last_eval = call_on_eval(run.hooks, run, row, lambda value: gather_object([value])[0])
        if first:
            self._require_objective()
        self._logged_at += time.perf_counter() - began

    def _evaluation_due(self) -> bool:
        """Whether to evaluate: at the start, at every interval, and on resume where the run stopped before or during one."""
        run, settings = self.run, self.run.config.train
        due = settings.eval_at_start if run.step == 0 else bool(settings.eval_every) and run.step % settings.eval_every == 0
        return due and run.step < run.total_steps and run.last_eval.get("step") != run.step

    def _require_objective(self) -> None:
        """Raises UserError where the first evaluation lacks objective.metric, as may happen with a user's own loss; saves a
        checkpoint first."""
        metric = self.run.config.objective.metric
        if metric in self.run.last_eval or metric in self.run.unmeasured:
            return
        if self.run.step:
            self.checkpointer.save(final=False)
        names = sorted(name for name in self.run.last_eval if name not in ("step", "split") and not name.startswith("seconds"))
        raise UserError(f"objective.metric={metric} is not measured; there are {', '.join(names)}")

    def _rows_of(self, step: int) -> Sequence[Item]:
        """This rank's first items of an earlier step; none in a live loop, or of a block of a stream, whose rows are gone."""
        if not isinstance(self.train.rows, Dataset | StreamRows) or not len(rows := self.order.batch(step)):
            return ()
        return self._split(self.train, rows, step)[0].items
