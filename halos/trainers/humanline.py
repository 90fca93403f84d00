"""Humanline (arXiv:2509.24207): log-ratios to the reference are clamped, token by token, before the loss sees them.

The paper models how people perceive the probability of text as rejection sampling, in the limit in which a token outside the
bounds counts as one at the bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from halos.config import schema
from halos.types import Mean, TokenLogps

CLAMPED = "humanline/clamped"  # the metric: the share of tokens beyond a bound


@dataclass(frozen=True, slots=True)
class Humanline:
    """Bounds of log(policy / reference) of a token, in nats; infinite where there is none."""

    low: float
    high: float

    @classmethod
    def of(cls, settings: schema.Humanline) -> Humanline | None:
        if settings.low is None and settings.high is None:
            return None
        low, high = (bound if bound is not None else sign * torch.inf for bound, sign in ((settings.low, -1), (settings.high, 1)))
        return cls(low, high)

    def clamp(self, policy: TokenLogps, reference: TokenLogps) -> tuple[TokenLogps, Mean]:
        return clamp(policy, reference, low=self.low, high=self.high)


def clamp(policy: TokenLogps, reference: TokenLogps, *, low: float, high: float) -> tuple[TokenLogps, Mean]:
    """Return the policy's log-probs, each at most at a bound from the reference's, and the share of tokens beyond one.

    A token within the bounds keeps its log-prob to the bit; one beyond them has no gradient.
    """
    ratio = policy.values.detach() - reference.values
    below, above = ratio < low, ratio > high
    values = torch.where(below, reference.values + low, torch.where(above, reference.values + high, policy.values))
    return replace(policy, values=values), Mean.of((below | above)[policy.mask])
