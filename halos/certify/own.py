"""A loss of halos, or of a user, under the trainer's arithmetic: sums over micro-batches and ranks, divided once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from halos.certify.case import Case, Part, Plan, Step, synthetic_case
from halos.config.bind import LossSpec
from halos.data.collate import mismatched_row
from halos.trainers.humanline import CLAMPED, Humanline
from halos.trainers.loss_checks import checked_loss, checked_statistics
from halos.types import Acted, LossInput, Mean, Mismatched, PackRow, RolloutBatch, RolloutInput, Sampled, TokenLogps

LONGEST = 4096  # tokens of a mismatched row


@dataclass(frozen=True, eq=False)
class OwnLoss:
    """A loss as bind_loss returns it, under a modifier or none."""

    spec: LossSpec
    humanline: Humanline | None = None

    @property
    def inputs(self) -> type[LossInput]:
        return self.spec.inputs

    @property
    def refers(self) -> bool:
        return self.spec.needs_reference

    @property
    def token_statistics(self) -> tuple[str, ...]:
        return self.spec.token_statistics

    @property
    def candidates(self) -> int:
        return self.spec.candidates

    def step(self, case: Case, plan: Plan, padding: int = 0) -> Step:
        """The loss over a global batch that is cut by `plan`, and its gradients, added up in the policy's table."""
        for entry in case.policy.entries.values():
            for leaf in entry.values():
                leaf.grad = None
        world, denominators = len(plan), self._denominators(case)
        rollouts, statistics = self._rollouts(case), self._statistics(case, plan, padding)
        total, sums, names, values = 0.0, dict[str, tuple[float, float]](), [], torch.full((len(case.items),), torch.nan)
        for part in (part for rank in plan for part in rank):
            positions, weight = (part, 1.0) if len(part) else (np.zeros(1, np.int64), 0.0)
            arguments, clamped = self._arguments(case, positions, rollouts, padding)
            loss = checked_loss(
                self.spec.function(*arguments, *self._more(case, statistics)), self.spec.name, arguments[0], len(positions)
            )
            scaled = [term.values.sum() * weight * world / denominators[term.per] for term in loss.terms.values()]
            share = torch.stack(scaled).sum()
            if share.requires_grad:
                (share / world).backward()
            total += share.item() / world
            metrics = {**loss.metrics, **({CLAMPED: clamped} if clamped is not None else {})}
            means = {**metrics, **{name: Mean.of(term.values) for name, term in loss.terms.items()}}
            names.append(frozenset(means))
            for name, mean in metrics.items() if weight else ():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + mean.total.item(), before[1] + mean.count.item())
            if weight:
                values[positions] = loss.values.detach().reshape(len(positions), -1).sum(-1).float()
        return Step(total, case.policy.gradients(), sums, names, values)

    def inputs_of(self, case: Case) -> tuple[list[Any], list[Any]]:
        """The loss's arguments for the whole batch at once, and what else it is called with."""
        arguments, _ = self._arguments(case, case.whole[0][0], self._rollouts(case), 0)
        return arguments, self._more(case, self._statistics(case, case.whole, 0))

    def _more(self, case: Case, statistics: Tensor | None) -> list[Any]:
        """What a loss is called with besides its inputs: statistics, and its state, which is that of a start where policy and
        reference are equal."""
        more: list[Any] = [] if statistics is None else [statistics]
        if self.spec.start is None:
            return more
        return [*more, self.spec.start if case.policy.seed == case.reference.seed else self._later]

    @cached_property
    def _later(self) -> Mapping[str, float]:
        """The state of a loss after a step on other rows."""
        assert self.spec.start is not None, "asked for where there is a state"
        assert self.spec.update is not None, "bind_loss requires both"
        case = synthetic_case(self, seed=7)
        arguments, _ = self._arguments(case, case.whole[0][0], self._rollouts(case), 0)
        statistics = self._statistics(case, case.whole, 0)
        known = [] if statistics is None else [statistics]
        metrics = self.spec.function(*arguments, *known, self.spec.start).metrics
        totals = {name: (mean.total.item(), mean.count.item()) for name, mean in metrics.items()}
        return self.spec.update(self.spec.start, totals)

    def _denominators(self, case: Case) -> dict[str, int]:
        """What `Loss.per` divides by, counted in the items."""
        names = self.inputs.example.completed
        tokens = {f"{name}_token": sum(int(item.completions[n].scored.sum()) for item in case.items)
                  for n, name in enumerate(names)}  # fmt: skip
        counts = {"item": len(case.items), "token": sum(tokens.values()), **tokens}
        return {per: max(1, count) for per, count in counts.items()}

    def _arguments(
        self, case: Case, positions: Part, rollouts: RolloutBatch | None, padding: int
    ) -> tuple[list[Any], Mean | None]:
        """The loss's inputs, and the share of clamped tokens under humanline."""
        items = [case.items[n] for n in positions]
        rows, kind = self.inputs.rows(items), self.inputs
        if rollouts is not None:
            output = case.policy.output(rows, padding)
            assert issubclass(kind, RolloutInput)
            logps = _logps(output)
            batch = _rows_of(rollouts, positions, logps.mask.shape[1])
            batch = replace(batch, old=logps.values.detach()) if case.first_pass else batch
            reference = TokenLogps(batch.reference, logps.mask) if batch.reference is not None else None
            return [kind.of_rollouts(output, batch), *([reference] if self.spec.takes_reference else [])], None
        (output, *references), clamped = self._outputs(case, rows, padding)
        return [*(kind.of(each, items) for each in (output, *references)), *self.spec.unneeded], clamped

    def _outputs(self, case: Case, rows: Sequence[PackRow], padding: int) -> tuple[list[Any], Mean | None]:
        """What the policy gives for `rows`, and the reference where the loss has one; and the share of clamped tokens."""
        policy = case.policy.output(rows, padding)
        references = [detached(case.reference.output(rows, padding))] if self.refers else []
        if self.humanline is None:
            return [policy, *references], None
        policy, clamped = self.humanline.clamp(_logps(policy), *references)
        return [policy, *references], clamped

    def _rollouts(self, case: Case) -> RolloutBatch | None:
        """The global batch's old log-probs and advantages, where the loss is on rollouts."""
        if self.spec.advantages is None:
            return None
        old, reference, value = self.sampled_logps(case)
        labels = [next(iter(item.labels.values())) for item in case.items]
        rewards, groups = torch.tensor(labels, dtype=torch.float64), torch.from_numpy(case.groups)
        sampled = Sampled(rewards, groups, old, reference, value)
        controlled = {"kl_coefficient": self.spec.settings["kl_coefficient"]} if self.spec.adapt is not None else {}
        estimates, dtype = self.spec.advantages(sampled, **controlled), case.policy.dtype
        returns = None if estimates.returns is None else estimates.returns.to(dtype)
        advantages = case.sign * estimates.advantages.to(dtype)
        return RolloutBatch(old.values, None, rewards.to(dtype), advantages, reference, returns, value, {}, case.first_pass)

    def sampled_logps(self, case: Case) -> tuple[TokenLogps, Tensor | None, Tensor | None]:
        """Of a global batch of rollouts: old log-probs, those of the reference and old values, where the loss has them."""
        rows = self.inputs.rows(case.items)
        old = detached(case.sampler.output(rows))
        logps, values = (old.logps, old.values) if isinstance(old, Acted) else (old, None)
        assert isinstance(logps, TokenLogps)
        reference = detached(case.reference.output(rows)) if self.refers else None
        reference = reference.logps if isinstance(reference, Acted) else reference
        return logps, reference.values if isinstance(reference, TokenLogps) else None, values

    @torch.no_grad()
    def _statistics(self, case: Case, plan: Plan, padding: int) -> Tensor | None:
        """Of the whole global batch in its order, gathered from all micro-batches of all ranks."""
        if self.spec.statistics is None:
            return None
        whole: Tensor | None = None
        for positions in (part for rank in plan for part in rank if len(part)):
            if self.spec.statistics_inputs is Mismatched:
                rows = [mismatched_row(case.items[n], case.partners[n], LONGEST) for n in positions]
                outputs = self._outputs(case, rows, padding)[0]
                arguments = [*(Mismatched(_logps(detached(each))) for each in outputs), *self.spec.unneeded]
            else:
                arguments, _ = self._arguments(case, positions, None, padding)
            values = checked_statistics(self.spec.statistics(*arguments), self.spec.name, len(positions))
            whole = values.new_zeros(len(case.items), *values.shape[1:]) if whole is None else whole
            whole[torch.from_numpy(positions)] = values
        return whole


def _logps(output: Any) -> TokenLogps:
    return output.logps if isinstance(output, Acted) else output


def detached(output: Any) -> Any:
    if isinstance(output, Acted):
        return Acted(output.logps.detach(), output.values.detach())
    return output.detach()


def _rows_of(batch: RolloutBatch, positions: Part, width: int) -> RolloutBatch:
    """Rows of a batch, cut or padded to `width`."""
    at = torch.from_numpy(positions)

    def cut(part: Tensor) -> Tensor:
        return pad(part[at], (0, width - part.shape[1]))

    def some(part: Tensor | None) -> Tensor | None:
        return None if part is None else cut(part)

    return replace(
        batch, old=cut(batch.old), advantages=cut(batch.advantages), rewards=batch.rewards[at], reference=some(batch.reference),
        returns=some(batch.returns), values=some(batch.values),
    )  # fmt: skip
