"""From a global batch to its loss: forward passes of policy and reference, denominators and statistics over the whole batch."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from halos.config.bind import LossSpec
from halos.config.reference_checks import reads_teacher_columns
from halos.data.collate import mismatched_row, pack_on_host
from halos.data.teacher import IDS, likeliest
from halos.distributed.device import seed_generators
from halos.errors import UserError
from halos.examples import Item, PackRow
from halos.hooks.base import Run
from halos.hooks.loss_state import LOSS_STATE, LossState
from halos.logps.model import in_rows, mask_of, share_prompts
from halos.logps.modes import Modes
from halos.logps.router import RouterLoss
from halos.logps.working_weights import keep_in_backward
from halos.trainers.ahead import NextStep, in_turn
from halos.trainers.humanline import CLAMPED, Humanline
from halos.trainers.loss_checks import checked_loss, checked_statistics
from halos.trainers.microbatches import Bounds, MicroBatch, Split, gather_in_order, split_into_microbatches
from halos.trainers.reference import ReferenceLogps
from halos.types import HostSequences, Loss, Mean, Mismatched, Sequences, TokenLogps


class Objective:
    """A loss over items. Its input type turns items into rows of tokens, and the model's output into the loss's input."""

    def __init__(self, run: Run, loss: LossSpec, *, reference: nn.Module | None) -> None:
        self.run, self.loss, self.reference = run, loss, reference
        self.reference_logps: ReferenceLogps | None = None  # in the place of a reference model
        self.settings = run.config.train
        self.humanline = Humanline.of(run.config.humanline)
        self._clamped: Mean | None = None  # tokens of the last forward pass
        self._unclamped: Any = None  # the loss's first argument in the last forward pass, as it was before that
        self.router = RouterLoss.of(run.model, self.settings.router_aux_loss)
        self.deals_together = True  # items of a prompt; not in a run that an earlier version began
        # the next micro-batch, by a thread; not where the user's own code may draw from the generators that the step draws from
        self.packs_ahead = not loss.has_own_rows and type(self).rows is Objective.rows
        self._prepared = NextStep()
        self._modes: Modes | None = None
        self.outputs: Sequence[Tensor] = ()  # of the policy in its last forward pass
        # a balancing loss counts each row's own tokens, its prompt's included
        self.shares_prompts = self.settings.share_prompts and self.router is None and share_prompts(run.module, reference)

    @property
    def bounds(self) -> Bounds:
        """Of a micro-batch."""
        size, tokens = self.settings.microbatch_size, self.run.microbatch_tokens
        return Bounds(size, tokens, self.shares_prompts, together=self.deals_together)

    @property
    def modes(self) -> Modes:
        """Of the policy with the layers that it has now; hooks may give it others."""
        if self._modes is None or not self._modes.is_current:
            self._modes = Modes(self.run.module)
        return self._modes

    def rows(self, items: Sequence[Item]) -> list[PackRow]:
        """The token sequences of these items."""
        return self.loss.inputs.rows(items)

    def inputs(self, output: Any, microbatch: MicroBatch) -> Any:
        """The loss's first parameter, from the model's output over the `rows` of a micro-batch's items."""
        return self.loss.inputs.of(output, microbatch.items)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are functions of other metrics' means, but for those that the loss returns itself."""
        return {name: value for name, value in self.loss.derive(means).items() if name not in means}

    def adapted(self) -> Mapping[str, Any]:
        """Hyperparameters of the loss that are training state, with their values in this step."""
        return {}

    # --- a global batch --------------------------------------------------------------------------------------------------

    def _microbatches(self, split: Split, indices: np.ndarray) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch."""
        if self.reference_logps is not None:
            self.reference_logps.cover(split, indices)  # here, and not in a thread
        return self._prepared.take(self._key_of(split, indices, self.run.step)) or self._split(split, indices, self.run.step)

    def _prepare(self, split: Split, indices: np.ndarray, step: int) -> None:
        """Let a thread make the micro-batches of a later step, for `_microbatches` to return."""
        self._prepared.start(self._key_of(split, indices, step), lambda: self._split(split, indices, step))

    def _key_of(self, split: Split, indices: np.ndarray, step: int) -> Hashable:
        return id(split), indices.tobytes(), step, self.bounds

    def _split(self, split: Split, indices: np.ndarray, step: int) -> list[MicroBatch]:
        seeds, accelerator = (self.run.config.seed, step), self.run.accelerator
        return split_into_microbatches(split, indices, accelerator, bounds=self.bounds, seeds=seeds, pack=self._pack)

    def _denominators(self, split: Split, indices: np.ndarray) -> dict[str, int]:
        """The denominators that `Loss.per` chooses from, of the whole global batch: counted in the data, so that they are known
        before the first backward. At least 1: a minibatch may hold nothing but samples that were cut."""
        counts = self._counts(len(indices), split.rows.scored[indices].sum(0))
        return {per: max(1, count) for per, count in counts.items()}

    def _counts(self, items: int, scored: np.ndarray) -> dict[str, int]:
        """Of so many items, whose completions have so many `scored` tokens (completions,): what each `Loss.per` divides by."""
        tokens = zip(self.loss.inputs.example.completed, scored.tolist(), strict=True)
        return {"item": items, "token": int(scored.sum()), **{f"{name}_token": int(count) for name, count in tokens}}

    @torch.no_grad()
    def _statistics(self, microbatches: list[MicroBatch], total: int) -> Tensor | None:
        """The loss's statistics over the global batch, in its order; None where it has none, or `_loss` gets them for free."""
        mismatched = self.loss.statistics_inputs is Mismatched
        if self.loss.statistics is None or (len(microbatches) == 1 and not mismatched):
            return None
        parts, positions = [], [each.positions[: len(each.positions) if each.weight else 0] for each in microbatches]
        for microbatch in self._in_turn(microbatches):
            self._seed(microbatch)  # the dropout that the loss will see
            if mismatched:
                length = self.run.max_length
                pairs = zip(microbatch.items, microbatch.mismatched_partners, strict=True)
                rows = [mismatched_row(item, partner, length) for item, partner in pairs]
                arguments = self._forward(self._pack_rows(rows).to(self.run.accelerator.device), Mismatched)
            else:
                arguments = self._arguments(microbatch)
            values = checked_statistics(self.loss.statistics(*arguments), self.loss.name, len(microbatch.items))
            parts.append(values[: len(values) if microbatch.weight else 0])
        return gather_in_order(torch.cat(parts), np.concatenate(positions), total, self.run.accelerator)

    @torch.no_grad()
    def _routing(self, microbatches: list[MicroBatch]) -> Tensor | None:
        """How often the global batch chooses each expert: an extra forward pass where a rank has several micro-batches."""
        if self.router is None or len(microbatches) == 1:
            return None
        counts = []
        for microbatch in self._in_turn(microbatches):
            self._seed(microbatch)  # the dropout that the loss will see
            self._read(microbatch)
            counts.append(self.router.counts() * microbatch.weight)
        return self.run.accelerator.reduce(torch.stack(counts).sum(0), reduction="sum")

    # --- a micro-batch ---------------------------------------------------------------------------------------------------

    def _in_turn(self, microbatches: list[MicroBatch]) -> Iterator[MicroBatch]:
        return in_turn(microbatches, ahead=self.packs_ahead)

    def _seed(self, microbatch: MicroBatch) -> None:
        seed_generators(self.run.accelerator.device, microbatch.seed)

    def _loss(self, microbatch: MicroBatch, statistics: Tensor | None, total: int) -> Loss:
        self._seed(microbatch)
        arguments = self._arguments(microbatch)
        if self.loss.statistics is not None and statistics is None:
            # a single micro-batch: the loss's own forward pass gives its statistics too
            with torch.no_grad():
                values = self.loss.statistics(*(given if given is None else given.detach() for given in arguments))
            values = checked_statistics(values, self.loss.name, len(microbatch.items))
            own = len(values) if microbatch.weight else 0
            statistics = gather_in_order(values[:own], microbatch.positions[:own], total, self.run.accelerator)
        state = self._state()
        further = [each for each in (statistics, state and state.values) if each is not None]
        loss = self.loss.function(*arguments, *further, **self.adapted())
        loss = checked_loss(loss, self.loss.name, arguments[0], len(microbatch.items))
        return loss if self._unclamped is None else self._with_own_logps(loss, [*arguments[1:], *further])

    @torch.no_grad()
    def _with_own_logps(self, loss: Loss, more: Sequence[Any]) -> Loss:
        """The loss with the policy's log-probs in its metrics `logps/...` and `nll`, and not what humanline made of them."""
        own = self.loss.function(self._unclamped, *more, **self.adapted()).metrics
        kept = {name: own[name] for name in own if {"logps", "nll"} & {*name.split("/")}}
        return replace(loss, metrics={**loss.metrics, **kept})

    def _state(self) -> LossState | None:
        state = self.run.hooks[LOSS_STATE] if self.loss.start is not None else None
        assert state is None or isinstance(state, LossState)
        return state

    def _advance_state(self, totals: Mapping[str, tuple[float, float]]) -> None:
        """Give the loss its state after a step with these totals and counts of metrics over the global batch."""
        if (state := self._state()) is not None:
            state.update(totals)

    def _means(self, loss: Loss, microbatch: MicroBatch) -> dict[str, Mean]:
        counts, values = self._counts(len(microbatch.items), microbatch.scored), loss.values
        means = {name: Mean(part.values.detach().sum(), values.new_full((), float(counts[part.per])))
                 for name, part in loss.terms.items()}  # fmt: skip
        clamped = {CLAMPED: self._clamped} if self._clamped is not None else {}
        return {**loss.metrics, **clamped, **means}

    def _balance(self, microbatch: MicroBatch, routing: Tensor | None) -> Mean | None:
        """A micro-batch's part of the routers' balancing loss, after its forward pass; None where there is no such loss."""
        if self.router is None:
            return None
        if routing is None:  # each rank has only this micro-batch
            with torch.no_grad():
                routing = self.run.accelerator.reduce(self.router.counts() * microbatch.weight, reduction="sum")
        return self.router.part(routing)

    # --- a forward pass --------------------------------------------------------------------------------------------------

    def _arguments(self, microbatch: MicroBatch) -> list[Any]:
        """The loss's positional arguments for a micro-batch, except statistics."""
        batch = microbatch.packed.result().to(self.run.accelerator.device)
        return self._forward(batch, lambda output: self.inputs(output, microbatch))

    def packed(self, rows: Sequence[PackRow], *, by: nn.Module | None = None) -> Sequences:
        """The input of the models, on their device; where `by` is given, of that model too."""
        return pack_on_host(rows, share=self.shares_prompts and share_prompts(by)).to(self.run.accelerator.device)

    def _pack(self, items: Sequence[Item]) -> HostSequences:
        packed = self._pack_rows(self.rows(items))
        if reads_teacher_columns(self.run.config, self.loss):
            packed = packed.with_reference(self._teacher_logps([items[leaf] for leaf in packed.leaves]))
        return packed.pinned(self.run.accelerator.device)

    def _teacher_logps(self, items: Sequence[Item]) -> np.ndarray:
        """What the rows of `items` have of a teacher: (scored, 1 + 2 k) float32. Raises UserError for a row that has nothing."""
        if lacking := [item.id for item in items if item.teacher_logps is None]:
            raise UserError(f"{lacking[0].rpartition('#')[0]}: there is no reference.name_or_path, and the row has no {IDS}")
        return np.concatenate(
            [likeliest(item.teacher_logps, self.loss.candidates) for item in items if item.teacher_logps is not None]
        )

    def _pack_rows(self, rows: Sequence[PackRow]) -> HostSequences:
        """Pack rows with the reference's log-probs where they are known; of rollouts all is known elsewhere."""
        packed = pack_on_host(rows, share=self.shares_prompts)
        if self.reference_logps is None or self.loss.on_rollouts:
            return packed
        return packed.with_reference(self.reference_logps.of([rows[leaf] for leaf in packed.leaves]))

    def _forward(self, batch: Sequences, shape: Callable[[Any], Any]) -> list[Any]:
        """The policy's output, and the reference's where the loss needs it, each converted by `shape`."""
        with self.run.accelerator.autocast():
            # the reference first, before the policy's activations are in memory
            batch = self._with_likeliest(batch)
            references = [self._reference(batch)] if self.loss.needs_reference else []
            policy = self._policy(batch)
            if self.humanline is not None:
                self._unclamped = shape(policy.detach())
                policy, self._clamped = self.humanline.clamp(policy, *references)
            return [shape(policy), *map(shape, references), *self.loss.unneeded]

    def _read(self, microbatch: MicroBatch) -> Any:
        """The policy's output for a micro-batch."""
        with self.run.accelerator.autocast():
            return self._policy(microbatch.packed.result().to(self.run.accelerator.device))

    def _output(self, items: Sequence[Item]) -> Any:
        """The policy's output for items."""
        with self.run.accelerator.autocast():
            return self._policy(self.packed(self.rows(items)))

    def _policy(self, batch: Sequences) -> Any:
        """The policy's output; in training its router logits are recorded where the loss has a balancing term."""
        module = self.run.module
        with self.router.recording() if self.router is not None and module.training else nullcontext():
            output = module(batch)
        self.outputs = tree_leaves(output)
        keep_in_backward(self.outputs)
        return output

    def _with_likeliest(self, batch: Sequences) -> Sequences:
        """The batch with what its teacher says, computed now where it is not known, for a loss on the teacher's likeliest ids."""
        if not self.loss.candidates or batch.reference is not None:
            return batch
        known = self._refer(batch)
        at = (batch.rows, batch.columns)
        return replace(batch, reference=known.values[at], likeliest=torch.cat([known.candidates[at], known.ids[at].float()], -1))

    def _reference(self, batch: Sequences) -> Any:
        """The reference's output: known, or computed now."""
        if batch.reference is None:
            return self._refer(batch)
        likeliest = None
        if batch.likeliest is not None:
            likeliest = in_rows(batch.likeliest[:, : batch.likeliest.shape[1] // 2], batch)
        return TokenLogps(in_rows(batch.reference, batch), mask_of(batch), candidates=likeliest)

    def _move_reference(self) -> None:
        """Where the reference follows the policy; before `Strategy.clip`, which under DeepSpeed is the update."""
        if self.run.moving_reference is not None:
            self.run.moving_reference.before_update(self.run.step + 1)

    @torch.no_grad()
    def _refer(self, batch: Any) -> Any:
        """The reference model's output: that of a frozen copy, or of the policy with its initial values."""
        model = self.run.module
        if self.reference is not None:
            return self.reference(batch)
        with self.modes.evaluating(), self.modes.own_reference():
            return model(batch)
