"""The loop. A step is the exact mean over every item of the global batch, however that was cut up."""

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from halos.checkpoint.checkpointer import Checkpointer
from halos.config.bind import LossSpec
from halos.data.dataset import Dataset
from halos.data.order import eval_batches
from halos.errors import UserError
from halos.examples import Item
from halos.hooks.base import Run, call_on_eval
from halos.metrics import Meter, Window
from halos.trainers.deal import Chunk, Split, deal
from halos.trainers.guard import Contribution, Guard, spoil
from halos.trainers.memory import peak_mb
from halos.trainers.objective import Objective
from halos.types import Mean

log = logging.getLogger(__name__)

Totals = Mapping[str, tuple[float, float]]


class Batches(Protocol):
    """Which rows each global batch holds."""

    def batch(self, number: int) -> np.ndarray: ...


Exam = Callable[[], Mapping[str, float]]  # metrics; every process calls it, and gets the same


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that a trainer is assembled from."""

    run: Run
    loss: LossSpec
    checkpointer: Checkpointer
    train: Split
    held_out: Split | None
    order: Batches
    reference: nn.Module | None
    exam: Exam | None  # what an evaluation measures, where it is not the loss over held-out items


class Trainer(Objective):
    """Owns the loop. A subclass may be chosen by `trainer._target_`; its keyword-only parameters are its keys."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.run, parts.loss, reference=parts.reference)
        self.checkpointer = parts.checkpointer
        self.train, self.held_out, self.order, self.exam = parts.train, parts.held_out, parts.order, parts.exam
        self.guard = Guard(self.run, self._output, self._rows_of)
        self._logged_at, self._logged_tokens, self._idle = 0.0, 0, 0.0  # as of the last logged step

    def refuse_lost(self) -> None:
        """Raises UserError where what a run goes on with besides a checkpoint is damaged or gone; changes nothing."""

    def prepare(self) -> None:
        """What is to be known of the data before the first step."""

    # --- the loop --------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last step, or until a hook or a signal says stop. `FINAL` is written only by a run that finished."""
        run, checkpointer = self.run, self.checkpointer
        self.guard.refuse_start()
        checkpointer.start()
        run.call_hooks(lambda hook: hook.on_start(run))
        self.prepare()
        if not run.stop and self._evaluation_due():
            self.evaluate()
        self._start_window()
        while run.step < run.total_steps and not run.stop:
            self._log(self.step(self.order.batch(run.step)))
            if run.step == run.total_steps or run.stop:
                break
            if self._evaluation_due():
                self.evaluate()
            if checkpointer.due() and not run.stop:
                checkpointer.save(final=False)
        if not run.stopped_early and run.last_eval.get("step") != run.step:
            self.evaluate()
        checkpointer.finish_save()
        if run.failed or (not run.stopped_early and self.guard.refuse_final()):
            return  # what was saved before stays as it is
        checkpointer.finish()

    def step(self, indices: np.ndarray) -> Totals:
        """One optimizer step over a global batch: the sum of its items' losses over the count of the whole batch.

        The host waits for the device once, before the optimizer moves: for the gradient's norm, which decides whether it does,
        and all that is logged. Of a step that was skipped there are no totals.
        """
        run, strategy = self.run, self.run.strategy
        run.learning_rates.set(run.step)
        run.module.train()
        chunks = self._deal(self.train, indices)
        meter, parts = self._backward(chunks, indices)
        totals = self._reduce(meter, strategy.clip(run.module, self.settings.max_grad_norm))
        norm = totals["grad_norm"][0]
        if moves := self.guard.passes(norm, chunks[0].items):
            strategy.step(run.optimizer)
        strategy.zero_grad(run.optimizer)
        run.step += 1
        run.examples += len(indices)
        run.tokens += int(self.train.rows.lengths[indices].sum())
        run.stop_if_requested(totals.pop("stop")[0] > 0)
        if totals.pop("written", (0.0,))[0] == run.accelerator.num_processes:
            self.checkpointer.finish_save()
        if not moves:
            total, count = totals["loss"]
            self.guard.skip(self.train, parts, loss=total / count, norm=norm)
        return totals if moves else {}

    def _backward(self, chunks: list[Chunk], indices: np.ndarray) -> tuple[Meter, list[Contribution]]:
        """Gradients of a global batch, and what its loss and metrics are made of."""
        run, meter, parts = self.run, Meter(), list[Contribution]()
        world, counts = run.accelerator.num_processes, self._counts(self.train, indices)
        statistics, routing = self._statistics(chunks, len(indices)), self._routing(chunks)
        for number, chunk in enumerate(chunks, 1):
            last = number == len(chunks)
            with nullcontext() if last else run.strategy.accumulate(run.module):
                loss = self._loss(chunk, statistics, len(indices))
                total, means = loss.values.sum() * chunk.weight, self._means(loss, chunk)
                # gradients are averaged over processes: scale the sum back up before dividing by the global count
                total = total * world / counts[loss.per]
                if (balance := self._balance(chunk, routing)) is not None and self.router is not None:
                    total = total + self.router.weight * balance.total * chunk.weight * world
                    means["router_aux_loss"] = balance
                run.strategy.backward(run.module, spoil(total, self.outputs), last=last)
            meter.add(means, chunk.weight)
            if chunk.weight:
                parts.append(Contribution(indices[chunk.places], chunk.places, loss.values.detach()))
        return meter, parts

    def _reduce(self, meter: Meter, norm: Tensor) -> dict[str, tuple[float, float]]:
        """A step's totals over all processes, in one collective: with its metrics the norm, and what processes must agree on."""
        run, device, written = self.run, self.run.accelerator.device, self.checkpointer.written
        flags = {"stop": bool(run.stop_requested), **({"written": written} if written is not None else {})}
        meter.add({name: Mean.of(torch.tensor(float(flag), device=device)) for name, flag in flags.items()})
        meter.add({"grad_norm": Mean.of(norm.to(device))})
        totals = meter.reduce(lambda table: run.accelerator.reduce(table, reduction="sum"))
        total, count = totals["grad_norm"]  # every process has added the same
        return {**totals, "grad_norm": (total / count, 1.0)}

    def _log(self, totals: Totals) -> None:
        """Count a step's totals; every `log_every` steps their means become a line."""
        run, row = self.run, {}
        run.window.add(totals)
        if run.step % self.settings.log_every == 0 or run.step == run.total_steps:
            means = {"loss": math.nan, **run.window.means()}  # nan where every step of the window was skipped
            seconds = time.perf_counter() - self._logged_at - (self.checkpointer.seconds - self._idle)
            row = {"step": run.step, "split": "train", **means, **self.derived(means)}
            row |= {"lr": run.optimizer.param_groups[0]["lr"], "examples": run.examples, "tokens": run.tokens}
            row |= {"skipped_steps": run.skipped_steps}
            row |= {"seconds": round(seconds, 4), "tokens_per_second": round((run.tokens - self._logged_tokens) / seconds, 1)}
            row |= {"peak_memory_mb": peak_mb(run.accelerator.device)}
            run.last_train, run.window = row, Window()
            self._start_window()
        self.checkpointer.note_good()
        run.call_hooks(lambda hook: hook.on_step(run, row))

    def _start_window(self) -> None:
        """From here on seconds and tokens count for the next line; those of saves and evaluations do not."""
        self._logged_at, self._logged_tokens, self._idle = time.perf_counter(), self.run.tokens, self.checkpointer.seconds

    # --- evaluation ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out metrics: the same loss over all held-out items, or what the exam finds."""
        run, began = self.run, time.perf_counter()
        if self.held_out is None and self.exam is None:
            return
        run.module.eval()
        means = self.exam() if self.exam else self._held_out_means()
        if run.stopped_early:
            return  # and it is made when the run goes on
        seconds, first = time.perf_counter() - began, not run.last_eval
        row = {"step": run.step, "split": "eval", **means, "seconds": round(seconds, 3)}
        run.last_eval = call_on_eval(run.hooks, run, row, lambda value: gather_object([value])[0])
        if first:
            self._know_objective()
        self._logged_at += time.perf_counter() - began

    def _held_out_means(self) -> dict[str, float]:
        """In global batches of the training size; nothing where a signal came between."""
        run, meter, parts = self.run, Meter(), list[Contribution]()
        assert self.held_out is not None
        batches = eval_batches(len(self.held_out.rows), self.settings.batch_size)
        quiet = not run.main or not sys.stderr.isatty()
        for indices in tqdm(batches, desc="held out", unit="batch", leave=False, disable=quiet):
            run.sync_stop_request()
            if run.stopped_early:
                break
            chunks = self._deal(self.held_out, indices)
            statistics = self._statistics(chunks, len(indices))
            for chunk in chunks:
                loss = self._loss(chunk, statistics, len(indices))
                meter.add(self._means(loss, chunk), chunk.weight)
                if chunk.weight:
                    values = loss.values.reshape(len(chunk.places), -1).sum(-1)
                    parts.append(Contribution(indices[chunk.places], chunk.places, values))
        run.strategy.reshard(run.module)
        if run.stopped_early:
            return {}
        window = Window()
        window.add(meter.reduce(lambda table: run.accelerator.reduce(table, reduction="sum")))
        means = window.means()
        self.guard.evaluated(self.held_out, parts, means["loss"])
        return {**means, **self.derived(means), "examples": len(self.held_out.rows)}

    def _evaluation_due(self) -> bool:
        """At the start, at every interval; and where a run goes on that was stopped before or during one."""
        run, settings = self.run, self.run.config.train
        due = settings.eval_at_start if run.step == 0 else bool(settings.eval_every) and run.step % settings.eval_every == 0
        return due and run.step < run.total_steps and run.last_eval.get("step") != run.step

    def _know_objective(self) -> None:
        """Raises UserError where the first evaluation does not measure what the run is judged by, as a loss of a user's own may
        not; what was trained until then is saved."""
        metric = self.run.config.objective.metric
        if metric in self.run.last_eval or metric in self.run.unmeasured:
            return
        if self.run.step:
            self.checkpointer.save(final=False)
        names = sorted(self.run.last_eval.keys() - {"step", "split", "seconds"})
        raise UserError(f"objective.metric={metric} is not measured; there are {', '.join(names)}")

    def _rows_of(self, step: int) -> Sequence[Item]:
        """This process's first rows of a step that is over; none where they were sampled."""
        if not isinstance(self.train.rows, Dataset):
            return ()
        size, seeds = self.settings.microbatch_size, (self.run.config.seed, step)
        return deal(self.train, self.order.batch(step), self.run.accelerator, size=size, seeds=seeds)[0].items
