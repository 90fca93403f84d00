"""How far the sampler's log-probs are from the trainer's own, and a bounded importance weight that corrects for it.

Both are of one policy. They differ where sampler and trainer compute in different arithmetic, or where the weights that sampled
were not these: then samples come from a distribution that the loss does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halos.config.bind import LossSpec
from halos.config.schema import Train
from halos.losses.rollouts import LARGEST
from halos.metrics import LARGEST_DIFFERENCE
from halos.types import Mean

Totals = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Correction:
    """A weight for every advantage by w = pi_trainer / pi_sampler: of each token, of a whole completion (their product), or of a
    completion per token (their geometric mean).

    `truncate` is w held between `floor` and `cap`: truncated importance sampling (E. Ionides, 2008), where there is no floor.
    `mask` is w between them, and 0 outside; `reject` is 1 and 0. Without a floor these two begin at 1 / cap.
    """

    kind: str  # none | truncate | mask | reject
    level: str  # token | sequence | geometric
    cap: float
    floor: float | None = None

    @classmethod
    def of(cls, train: Train, loss: LossSpec, *, same_arithmetic: bool) -> Correction:
        """`same_arithmetic`: the model in training sampled, in this process; then `auto` corrects nothing."""
        kind = train.correction
        if kind == "auto":
            kind = "none" if same_arithmetic else "truncate"
        return cls(kind, train.correction_level or loss.ratio_level, train.correction_cap, train.correction_floor)

    def weigh(self, advantages: Tensor, old: Tensor, sampled: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Mean]]:
        """Weigh advantages, and measure the mismatch. All tensors are (rows, time); `sampled`, the sampler's log-probs, is NaN
        where they are not known: there the weight is 1."""
        known = mask & ~sampled.isnan()
        difference = torch.where(known, old - sampled, 0.0)
        logs, counted = self._by_level(difference, known)
        ratio, least = logs.clamp(-LARGEST, LARGEST).exp(), self._least
        within = (ratio <= self.cap) & (ratio >= least)
        metrics = {"mismatch/mean": Mean.of(difference.abs(), known), "mismatch/weight": Mean.of(ratio, counted),
                   "mismatch/weight_square": Mean.of(ratio**2, counted)}  # fmt: skip
        if self.kind == "none":
            return advantages, metrics
        metrics["mismatch/bounded"] = Mean.of(~within, counted)
        if self.kind == "truncate":
            return advantages * ratio.clamp(least, self.cap), metrics
        return advantages * torch.where(within, ratio if self.kind == "mask" else 1.0, 0.0), metrics

    @property
    def _least(self) -> float:
        if self.floor is not None:
            return self.floor
        return 0.0 if self.kind == "truncate" else 1 / self.cap

    def _by_level(self, difference: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """log w, and where there is one: (rows, time), or (rows, 1) of completions."""
        if self.level == "token":
            return difference, known
        total = difference.sum(-1, keepdim=True)
        tokens = known.sum(-1, keepdim=True)
        return total if self.level == "sequence" else total / tokens.clamp(min=1), tokens > 0


def largest(old: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
    """The largest difference of a token's log-probs: ()."""
    return torch.where(mask & ~sampled.isnan(), (old - sampled).abs(), 0.0).max()


def largest_of_rank(rank: int) -> str:
    """The name under which a rank adds its largest difference to what the ranks sum: a mean of one number."""
    return f"{LARGEST_DIFFERENCE} of rank {rank}"


def with_largest(totals: Totals) -> dict[str, tuple[float, float]]:
    """The totals of a step with the largest difference of all ranks in the place of each rank's."""
    of_ranks = [total for name, (total, _) in totals.items() if name.startswith(f"{LARGEST_DIFFERENCE} of rank ")]
    others = {name: pair for name, pair in totals.items() if not name.startswith(f"{LARGEST_DIFFERENCE} of rank ")}
    return {**others, LARGEST_DIFFERENCE: (float(np.max(of_ranks)), 1.0)} if of_ranks else others  # nan, if any is


def derived(means: Mapping[str, float]) -> dict[str, float]:
    """The effective sample size as a fraction of the samples: (mean w)^2 / mean w^2, 1 where all weights are equal."""
    if not means.get("mismatch/weight_square"):
        return {}
    return {"mismatch/ess": means["mismatch/weight"] ** 2 / means["mismatch/weight_square"]}
