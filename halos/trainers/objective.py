"""From a global batch to its loss: forward passes of policy and reference, and what a loss wants to know of the whole batch."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from halos.config.bind import LossSpec
from halos.data.collate import mismatched_row, pack
from halos.examples import Item, PackRow
from halos.hooks.base import Run
from halos.logps.model import initial_policy
from halos.logps.router import RouterLoss
from halos.trainers.deal import Chunk, Split, deal, gather_in_order
from halos.types import Loss, Mean, Mismatched, Sequences


class Objective:
    """A loss over items. How they become rows of tokens, and the model's output what the loss takes, is its input type's."""

    def __init__(self, run: Run, loss: LossSpec, *, reference: nn.Module | None) -> None:
        self.run, self.loss, self.reference = run, loss, reference
        self.settings = run.config.train
        self.router = RouterLoss.of(run.model, self.settings.router_aux_loss)
        self.outputs: Sequence[Tensor] = ()  # of the policy in its last forward pass

    def rows(self, items: Sequence[Item]) -> list[PackRow]:
        """The sequences that the model sees for these items."""
        return self.loss.inputs.rows(items)

    def inputs(self, output: Any, chunk: Chunk) -> Any:
        """The loss's first parameter, from the model's output over the `rows` of a chunk's items."""
        return self.loss.inputs.of(output, chunk.items)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are functions of other metrics' means."""
        return self.loss.inputs.derived(means)

    # --- a global batch --------------------------------------------------------------------------------------------------

    def _deal(self, split: Split, indices: np.ndarray) -> list[Chunk]:
        seeds = (self.run.config.seed, self.run.step)
        return deal(split, indices, self.run.accelerator, size=self.settings.microbatch_size, seeds=seeds)

    def _counts(self, split: Split, indices: np.ndarray) -> dict[str, int]:
        """Items and scored tokens of the whole global batch: from the data alone, so before the first backward."""
        return {"item": len(indices), "token": int(split.rows.scored[indices].sum())}

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
                rows = [mismatched_row(item, partner, length) for item, partner in zip(chunk.items, chunk.partners, strict=True)]
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
            self._output(chunk.items)
            counts.append(self.router.counts() * chunk.weight)
        return self.run.accelerator.reduce(torch.stack(counts).sum(0), reduction="sum")

    # --- a micro-batch ---------------------------------------------------------------------------------------------------

    def _loss(self, chunk: Chunk, statistics: Tensor | None, total: int) -> Loss:
        torch.manual_seed(chunk.seed)
        arguments = self._arguments(chunk)
        if self.loss.statistics is not None and statistics is None:
            # a single micro-batch: the forward pass that the loss needs serves its statistics too
            with torch.no_grad():
                values = self.loss.statistics(*(argument.detach() for argument in arguments))
            statistics = gather_in_order(values[: len(values) if chunk.weight else 0], total, self.run.accelerator)
        return self.loss.function(*arguments, *([statistics] if statistics is not None else []))

    def _means(self, loss: Loss, chunk: Chunk) -> dict[str, Mean]:
        count = len(chunk.items) if loss.per == "item" else chunk.num_scored
        return {**loss.metrics, "loss": Mean(loss.values.detach().sum(), loss.values.new_tensor(float(count)))}

    def _balance(self, chunk: Chunk, routing: Tensor | None) -> Mean | None:
        """A micro-batch's share of the routers' balancing loss, after its forward pass; None where the loss has no such part."""
        if self.router is None:
            return None
        if routing is None:  # this is the one micro-batch that each process has
            with torch.no_grad():
                routing = self.run.accelerator.reduce(self.router.counts() * chunk.weight, reduction="sum")
        return self.router.part(routing)

    # --- a forward pass --------------------------------------------------------------------------------------------------

    def _arguments(self, chunk: Chunk) -> list[Any]:
        """What the loss is given for a chunk, its statistics apart."""
        return self._forward(self.rows(chunk.items), lambda output: self.inputs(output, chunk))

    def _forward(self, rows: list[PackRow], shape: Callable[[Any], Any]) -> list[Any]:
        """The policy's output, and the reference's where the loss compares with one, in the loss's own types."""
        batch = pack(rows).to(self.run.accelerator.device)
        with self.run.accelerator.autocast():
            # the reference first, so that it does not meet the policy's activations in memory
            references = [shape(self._refer(batch))] if self.loss.needs_reference else []
            return [shape(self._policy(batch)), *references]

    def _output(self, items: Sequence[Item]) -> Any:
        """The policy's alone."""
        with self.run.accelerator.autocast():
            return self._policy(pack(self.rows(items)).to(self.run.accelerator.device))

    def _policy(self, batch: Sequences) -> Any:
        """The policy's output; in a step its routers are watched, where their balance is part of the loss."""
        module = self.run.module
        with self.router.recording() if self.router is not None and module.training else nullcontext():
            output = module(batch)
        self.outputs = tree_leaves(output)
        return output

    @torch.no_grad()
    def _refer(self, batch: Any) -> Any:
        """The reference model's output: a frozen copy's, or the policy's own as it was when the run began."""
        model = self.run.module
        if self.reference is not None:
            return self.reference(batch)
        training = model.training
        try:
            with initial_policy(model):
                return model.eval()(batch)
        finally:
            model.train(training)
