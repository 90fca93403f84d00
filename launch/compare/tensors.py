"""Random log-probs on which losses are compared, and what a loss gives for them; no peer is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halos.types import Pair, TokenLogps

PAIRS, WIDTH = 8, 12


@dataclass(frozen=True)
class Outcome:
    """A mean loss, its gradient with respect to every log-prob or score, and what would be logged."""

    loss: Tensor
    gradient: Tensor
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Batch:
    """Rows [chosen, rejected], or samples; values are 0 where the mask is False."""

    policy: Tensor  # (2 pairs, time), a leaf that takes a gradient
    reference: Tensor  # (2 pairs, time)
    mask: Tensor  # (2 pairs, time) bool

    @classmethod
    def random(cls, seed: int, pairs: int = PAIRS) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, WIDTH + 1, (2 * pairs, 1), generator=generator)
        mask = torch.arange(WIDTH) < lengths
        policy, reference = -3 * torch.rand(2, 2 * pairs, WIDTH, generator=generator) * mask
        return cls(policy.requires_grad_(), reference, mask)

    def rows(self, where: slice) -> Batch:
        return Batch(self.policy.detach()[where].clone().requires_grad_(), self.reference[where], self.mask[where])

    def turned(self) -> Batch:
        """Exchange policy and reference, so that every log-ratio changes its sign."""
        return Batch(self.reference.clone().requires_grad_(), self.policy.detach(), self.mask)

    @property
    def policy_logps(self) -> TokenLogps:
        return TokenLogps(self.policy, self.mask)

    @property
    def reference_logps(self) -> TokenLogps:
        return TokenLogps(self.reference, self.mask)

    def outcome(self, loss: Tensor, metrics: Mapping[str, float]) -> Outcome:
        """Return an Outcome with the gradient of scored tokens only; padding holds no log-probs."""
        return Outcome(loss.detach(), torch.autograd.grad(loss, self.policy)[0] * self.mask, metrics)

    def pairs(self) -> tuple[Pair, Pair]:
        half = len(self.policy) // 2
        return Pair(*self.policy_logps.split(half)), Pair(*self.reference_logps.split(half))


def entropies(batch: Batch) -> Tensor:
    """Numbers in the place of the entropies of tokens, whose gradient reaches the log-probs: (rows, time)."""
    return -batch.policy / 2
