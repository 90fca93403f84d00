"""The loop. A step is the exact mean over every item of the global batch, however that was cut up."""

import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from halos.checkpoint import find
from halos.checkpoint.commit import DiskFullError, Gather, staged
from halos.checkpoint.saving import Saving
from halos.config import arithmetic
from halos.config.bind import LossSpec
from halos.data.collate import PackRow, mismatch, pack
from halos.data.dataset import Dataset, Item
from halos.data.order import eval_batches
from halos.errors import UserError
from halos.hooks.base import Run, Stop
from halos.hooks.checkpoint import CheckpointHook
from halos.logps.model import at_beginning
from halos.logps.router import RouterLoss
from halos.metrics import Meter, Window
from halos.trainers.deal import Chunk, Split, deal, gather_in_order
from halos.trainers.guard import Contribution, Guard, spoil
from halos.trainers.memory import peak_mb
from halos.trainers.schedule import multiplier
from halos.types import Loss, LossInput, Mean, Mismatched, Sequences

log = logging.getLogger(__name__)

Totals = Mapping[str, tuple[float, float]]


class Batches(Protocol):
    """Which rows each global batch holds."""

    def batch(self, number: int) -> np.ndarray: ...


Exam = Callable[[], Mapping[str, float]]  # metrics; every process calls it, and gets the same


class Trainer(ABC):
    """Owns the loop. A subclass says how items become rows of tokens, and the model's output what the loss takes."""

    takes: ClassVar[tuple[type[LossInput], ...]]  # first parameters of the losses that it trains with

    def __init__(
        self,
        run: Run,
        loss: LossSpec,
        checkpoint: CheckpointHook,
        *,
        train: Split,
        held_out: Split | None,
        order: Batches,
        reference: nn.Module | None,
        exam: Exam | None = None,
    ) -> None:
        self.run, self.loss, self.checkpoint = run, loss, checkpoint
        self.train, self.held_out, self.order, self.reference = train, held_out, order, reference
        self.exam = exam  # what an evaluation measures, where it is not the loss over held-out items
        self.guard = Guard(run, self._output, self._rows_of)
        self.settings = run.config.train
        self.router = RouterLoss.of(run.model, self.settings.router_aux_loss)
        self._clock, self._window_tokens = 0.0, 0
        self._saved = run.step  # the newest step that a checkpoint holds, or the one that needs none
        self._outputs: Sequence[Tensor] = ()  # of the policy in its last forward pass
        self._saving: Saving | None = None  # the one save that is under way

    @abstractmethod
    def rows(self, items: Sequence[Item]) -> list[PackRow]:
        """The sequences that the model sees for these items."""

    @abstractmethod
    def inputs(self, output: Any, chunk: Chunk) -> Any:
        """The loss's first parameter, from the model's output over the `rows` of a chunk's items."""

    def refuse_lost(self) -> None:  # noqa: B027  most need nothing else
        """Raises UserError where what a run goes on with besides a checkpoint is damaged or gone; changes nothing."""

    def begin(self) -> None:  # noqa: B027  most have nothing to do
        """What is to be known of the data before the first step."""

    @staticmethod
    def derived(means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are functions of other metrics' means."""
        return {}

    # --- the loop ------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last step, or until a hook or a signal says stop. `FINAL` is written only by a run that finished."""
        run = self.run
        self.guard.refuse_start()
        self._tell(lambda hook: hook.on_start(run))
        self.begin()
        if not run.stop and self._evaluation_due():
            self.evaluate()
        self._clock, self._window_tokens = time.perf_counter(), run.tokens
        while run.step < run.total_steps and not run.stop:
            self._log(self.step(self.order.batch(run.step)))
            if run.step == run.total_steps or run.stop:
                break
            if self._evaluation_due():
                self.evaluate()
            if self.checkpoint.due(run) and not run.stop:
                self.save(final=False)
        if not self._cut_short() and run.last_eval.get("step") != run.step:
            self.evaluate()
        self.land()
        if self._failed() or (not self._cut_short() and self.guard.refuse_final()):
            return  # what was saved before stays as it is
        if (self._cut_short() or self.checkpoint.due(run)) and self._saved != run.step:
            self.save(final=False)
            self.land()
        if not self._cut_short():
            self.save(final=True)

    def step(self, indices: np.ndarray) -> Totals:
        """One optimizer step over a global batch: the sum of its items' losses over the count of the whole batch.

        The host waits for the device once, before the optimizer moves: for the gradient's norm, which decides whether it does,
        and all that is logged. Of a step that was skipped there are no totals.
        """
        run = self.run
        for group in run.optimizer.param_groups:
            group["lr"] = run.config.optim.lr * multiplier(run.config.schedule, run.step, run.total_steps)
        run.module.train()
        chunks = self._deal(self.train, indices)
        meter, parts = self._backward_all(chunks, indices)
        totals = self._reduce(meter, run.strategy.clip(run.module, self.settings.max_grad_norm))
        norm = totals["grad_norm"][0]
        if moves := self.guard.passes(norm, chunks[0].items):
            run.strategy.step(run.optimizer)
        run.strategy.forget(run.optimizer)
        run.step += 1
        run.examples += len(indices)
        run.tokens += int(self.train.rows.lengths[indices].sum())
        self._stop_if(totals.pop("stop")[0])
        if totals.pop("written", (0.0,))[0] == run.accelerator.num_processes:
            self.land()
        if not moves:
            total, count = totals["loss"]
            self.guard.skip(self.train, parts, loss=total / count, norm=norm)
        return totals if moves else {}

    def _backward_all(self, chunks: list[Chunk], indices: np.ndarray) -> tuple[Meter, list[Contribution]]:
        """Gradients of a global batch, and what its loss and metrics are made of."""
        meter, parts, world = Meter(), list[Contribution](), self.run.accelerator.num_processes
        counts = self._counts(self.train, indices)
        statistics, routing = self._statistics(chunks, len(indices)), self._routing(chunks)
        for number, chunk in enumerate(chunks, 1):
            last = number == len(chunks)
            with nullcontext() if last else self.run.strategy.accumulate(self.run.module):
                loss = self._loss(chunk, statistics, len(indices))
                total, means = loss.values.sum() * chunk.weight, self._means(loss, chunk)
                # gradients are averaged over processes: scale the sum back up before dividing by the global count
                total = total * world / counts[loss.per]
                if self.router is not None:
                    balance = self.router.share(routing if routing is not None else self._chosen(chunk))
                    total = total + self.router.weight * balance.total * chunk.weight * world
                    means["router_aux_loss"] = balance
                self.run.strategy.backward(self.run.module, spoil(total, self._outputs), last=last)
            meter.add(means, chunk.weight)
            if chunk.weight:
                parts.append(Contribution(indices[chunk.places], chunk.places, loss.values.detach()))
        return meter, parts

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out metrics: the same loss over all held-out items, or what the exam finds."""
        run, began = self.run, time.perf_counter()
        if self.held_out is None and self.exam is None:
            return
        run.module.eval()
        means = self.exam() if self.exam else self._held_out_means()
        if self._cut_short():
            return  # and it is made when the run goes on
        seconds, first = time.perf_counter() - began, not run.last_eval
        run.last_eval = {"step": run.step, "split": "eval", **means, "seconds": round(seconds, 3)}
        if first:
            self._know_objective(means)
        self._tell(lambda hook: hook.on_eval(run, run.last_eval))
        self._clock += seconds

    def _held_out_means(self) -> dict[str, float]:
        """In global batches of the training size; nothing where a signal came between."""
        run, meter, parts = self.run, Meter(), list[Contribution]()
        assert self.held_out is not None
        batches = eval_batches(len(self.held_out.rows), self.settings.batch_size)
        quiet = not run.main or not sys.stderr.isatty()
        for indices in tqdm(batches, desc="held out", unit="batch", leave=False, disable=quiet):
            self._heed()
            if self._cut_short():
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
        if self._cut_short():
            return {}
        window = Window()
        window.add(meter.reduce(lambda table: run.accelerator.reduce(table, reduction="sum")))
        means = window.means()
        self.guard.evaluated(self.held_out, parts, means["loss"])
        return {**means, **self.derived(means), "examples": len(self.held_out.rows)}

    def save(self, *, final: bool) -> None:
        """A checkpoint, or with `final` what the user came for. It becomes visible at once, complete, or not at all.

        With checkpoint.async_save a checkpoint is copied here and written beside the next steps, until `land`.
        """
        self.land()
        run, began = self.run, time.perf_counter()
        apart = self.checkpoint.async_save and not final
        gather = self._gather(apart=apart)
        target = run.directory.final if final else run.directory.checkpoints / find.name_of(run.step)
        facts = {"step": run.step, "world_size": run.accelerator.num_processes, arithmetic.KEY: arithmetic.NUMBER}
        self._saving = Saving(target, run.step, final=final)
        parts = [partial(hook.on_save, run, final=final) for hook in run.hooks.values()]
        self._saving.begin(staged(target, main=run.main, gather=gather, facts=facts), parts, gather)
        self._saving.finish(apart=apart)
        self._clock += time.perf_counter() - began
        if not apart:
            self.land()
        if not final:
            self._heed()

    def land(self) -> None:
        """Wait for the save that is under way, if one is, and tell the hooks; every process alike. Raises what went wrong."""
        run, saving, began = self.run, self._saving, time.perf_counter()
        if saving is None:
            return
        self._saving = None
        try:
            saving.wait()
        except DiskFullError as error:
            self.checkpoint.on_disk_full(run, error, step=saving.step, final=saving.final)
        else:
            if run.main and not saving.final:
                find.record(run.directory, saving.target)
            self._tell(lambda hook: hook.on_saved(run, saving.target, final=saving.final))
            self._saved = self._saved if saving.final else saving.step
        self._clock += time.perf_counter() - began

    def _gather(self, *, apart: bool) -> Gather:
        """How the processes of a save speak; `apart` over a group of their own, since the steps use the default one."""
        if not apart or not dist.is_initialized():
            return gather_object
        group = self.run.writers = self.run.writers or cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
        everyone: list[Any] = [None] * self.run.accelerator.num_processes

        def gather(own: list[Any]) -> list[Any]:
            dist.all_gather_object(everyone, own, group=group)
            return [one for part in everyone for one in part]

        return gather

    # --- when to stop ----------------------------------------------------------------------------------------------------

    def _heed(self) -> None:
        """Have all processes know of a signal that one of them has had: what it asks for needs them all."""
        told = torch.tensor([float(bool(self.run.interrupted))], device=self.run.accelerator.device)
        self._stop_if(self.run.accelerator.reduce(told, reduction="sum").item())

    def _stop_if(self, told: float) -> None:
        if told:
            self.run.stop = Stop(self.run.interrupted or "another process was told to stop", finished=False, signalled=True)

    def _failed(self) -> bool:
        """Whether the run ends here since its weights, or its data, are broken: it leaves nothing new."""
        return self.run.stop is not None and self.run.stop.failed

    def _cut_short(self) -> bool:
        """Whether the run ends here but is not finished: it leaves a checkpoint, and no FINAL."""
        return self.run.stop is not None and not self.run.stop.finished

    def _know_objective(self, means: Mapping[str, float]) -> None:
        """Raises UserError where the first evaluation does not measure what the run is judged by, as a loss of a user's own may
        not; what was trained until then is saved."""
        metric = self.run.config.objective.metric
        if metric in self.run.last_eval or metric in self.run.unmeasured:
            return
        if self.run.step:
            self.save(final=False)
        raise UserError(f"objective.metric={metric} is not measured; there are {', '.join(sorted(means))}")

    def _evaluation_due(self) -> bool:
        """At the start, at every interval; and where a run goes on that was stopped before or during one."""
        run, every = self.run, self.settings.eval_every
        due = self.settings.eval_at_start if run.step == 0 else bool(every) and run.step % every == 0
        return due and run.step < run.total_steps and run.last_eval.get("step") != run.step

    # --- a step's parts ------------------------------------------------------------------------------------------------

    def _reduce(self, meter: Meter, norm: Tensor) -> dict[str, tuple[float, float]]:
        """A step's totals over all processes, in one collective: with its metrics the norm, and what processes must agree on."""
        run, device = self.run, self.run.accelerator.device
        flags = {"stop": bool(run.interrupted), **({"written": self._saving.done} if self._saving else {})}
        meter.add({name: Mean.of(torch.tensor(float(flag), device=device)) for name, flag in flags.items()})
        meter.add({"grad_norm": Mean.of(norm.to(device))})
        totals = meter.reduce(lambda table: run.accelerator.reduce(table, reduction="sum"))
        total, count = totals["grad_norm"]  # every process has added the same
        return {**totals, "grad_norm": (total / count, 1.0)}

    def _deal(self, split: Split, indices: np.ndarray) -> list[Chunk]:
        seeds = (self.run.config.seed, self.run.step)
        return deal(split, indices, self.run.accelerator, size=self.settings.microbatch_size, seeds=seeds)

    def _counts(self, split: Split, indices: np.ndarray) -> dict[str, int]:
        """Items and scored tokens of the whole global batch: from the data alone, so before the first backward."""
        return {"item": len(indices), "token": int(split.rows.scored[indices].sum())}

    def _means(self, loss: Loss, chunk: Chunk) -> dict[str, Mean]:
        count = len(chunk.items) if loss.per == "item" else chunk.num_scored
        return {**loss.metrics, "loss": Mean(loss.values.detach().sum(), loss.values.new_tensor(float(count)))}

    def _rows_of(self, step: int) -> Sequence[Item]:
        """This process's first rows of a step that is over; none where they were sampled."""
        if not isinstance(self.train.rows, Dataset):
            return ()
        settings = self.settings.microbatch_size, (self.run.config.seed, step)
        return deal(self.train, self.order.batch(step), self.run.accelerator, size=settings[0], seeds=settings[1])[0].items

    def _output(self, items: Sequence[Item]) -> Any:
        """The policy's alone."""
        with self.run.accelerator.autocast():
            return self._policy(pack(self.rows(items)).to(self.run.accelerator.device))

    def _forward(self, rows: list[PackRow], shape: Callable[[Any], Any]) -> list[Any]:
        """The policy's output, and the reference's where the loss compares with one, in the loss's own types."""
        batch = pack(rows).to(self.run.accelerator.device)
        with self.run.accelerator.autocast():
            # the reference first, so that it does not meet the policy's activations in memory
            references = [shape(self._refer(batch))] if self.loss.needs_reference else []
            return [shape(self._policy(batch)), *references]

    def _policy(self, batch: Sequences) -> Any:
        """The policy's output; in a step its routers are watched, where their balance is part of the loss."""
        module = self.run.module
        with self.router.watching() if self.router is not None and module.training else nullcontext():
            output = module(batch)
        self._outputs = tree_leaves(output)
        return output

    @torch.no_grad()
    def _refer(self, batch: Any) -> Any:
        """The reference model's output: a frozen copy's, or the policy's own as it was when the run began."""
        model = self.run.module
        if self.reference is not None:
            return self.reference(batch)
        training = model.training
        try:
            with at_beginning(model):
                return model.eval()(batch)
        finally:
            model.train(training)

    def _arguments(self, chunk: Chunk) -> list[Any]:
        """What the loss is given for a chunk, its statistics apart."""
        return self._forward(self.rows(chunk.items), lambda output: self.inputs(output, chunk))

    def _loss(self, chunk: Chunk, statistics: Tensor | None, total: int) -> Loss:
        torch.manual_seed(chunk.seed)
        arguments = self._arguments(chunk)
        if self.loss.statistics is not None and statistics is None:
            # a single micro-batch: the forward pass that the loss needs serves its statistics too
            with torch.no_grad():
                values = self.loss.statistics(*(argument.detach() for argument in arguments))
            statistics = gather_in_order(values[: len(values) if chunk.weight else 0], total, self.run.accelerator)
        return self.loss.function(*arguments, *([statistics] if statistics is not None else []))

    @torch.no_grad()
    def _statistics(self, chunks: list[Chunk], total: int) -> Tensor | None:
        """The loss's statistics over the global batch, in its order; None where none are wanted, or `_loss` has them free."""
        mismatched = self.loss.statistics_inputs is Mismatched
        if self.loss.statistics is None or (len(chunks) == 1 and not mismatched):
            return None
        parts = []
        for chunk in chunks:
            torch.manual_seed(chunk.seed)  # the dropout that the loss will see
            if mismatched:
                length = self.run.max_length
                rows = [mismatch(item, partner, length) for item, partner in zip(chunk.items, chunk.partners, strict=True)]
                arguments = self._forward(rows, Mismatched)
            else:
                arguments = self._arguments(chunk)
            values = self.loss.statistics(*arguments)
            parts.append(values[: len(values) if chunk.weight else 0])
        return gather_in_order(torch.cat(parts), total, self.run.accelerator)

    @torch.no_grad()
    def _routing(self, chunks: list[Chunk]) -> Tensor | None:
        """How often the global batch chooses each expert: a pass of its own, where one micro-batch does not tell all."""
        if self.router is None or len(chunks) == 1:
            return None
        counts = []
        for chunk in chunks:
            torch.manual_seed(chunk.seed)  # the dropout that the loss will see
            with self.run.accelerator.autocast():
                self._policy(pack(self.rows(chunk.items)).to(self.run.accelerator.device))
            counts.append(self.router.counts() * chunk.weight)
        return self.run.accelerator.reduce(torch.stack(counts).sum(0), reduction="sum")

    @torch.no_grad()
    def _chosen(self, chunk: Chunk) -> Tensor:
        """The same, of the one micro-batch that each process has, after its forward pass."""
        assert self.router is not None
        return self.run.accelerator.reduce(self.router.counts() * chunk.weight, reduction="sum")

    # --- telling -------------------------------------------------------------------------------------------------------

    def _tell(self, event: Callable[[Any], None]) -> None:
        for hook in self.run.hooks.values():
            event(hook)

    def _log(self, totals: Totals) -> None:
        """Count a step's totals; every `log_every` steps their means become a line."""
        run, row = self.run, {}
        run.window.add(totals)
        if run.step % self.settings.log_every == 0 or run.step == run.total_steps:
            means, seconds = run.window.means(), time.perf_counter() - self._clock
            means = {"loss": math.nan, **means}  # where every step of the window was skipped
            row = {"step": run.step, "split": "train", **means, **self.derived(means)}
            row |= {"lr": run.optimizer.param_groups[0]["lr"], "examples": run.examples, "tokens": run.tokens}
            row |= {"skipped_steps": run.skipped_steps}
            row |= {"seconds": round(seconds, 4), "tokens_per_second": round((run.tokens - self._window_tokens) / seconds, 1)}
            row |= {"peak_memory_mb": peak_mb(run.accelerator.device)}
            run.last_train, run.window = row, Window()
            self._clock, self._window_tokens = time.perf_counter(), run.tokens
        self._tell(lambda hook: hook.on_step(run, row))
