"""Generalised knowledge distillation on data: the divergence between a teacher's distribution of each token and the policy's."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from halos.types import Loss, Mean, Range, TokenLogps

LEAST = torch.finfo(torch.float32).eps  # of the probability of all other ids: below it 1 - sum p is rounding


@dataclass(frozen=True, slots=True)
class Distilled(TokenLogps):
    """Log-probs of the scored tokens, and of the ids that the teacher holds for the likeliest in their place."""


def candidates(*, top_k: Annotated[int, Range(least=1)]) -> int:
    """The number of ids of which the reference keeps the log-probs, and which the policy reads too."""
    return top_k


def gkd(
    policy: Distilled,
    reference: Distilled,
    *,
    beta: Annotated[float, Range(least=0, most=1)],
    tail: Literal["bucket", "drop"],
) -> Loss:
    """beta KL(p || m) + (1 - beta) KL(q || m) of each token, with m = beta p + (1 - beta) q (eq. 1 of arXiv:2306.13649), where p
    is the teacher's distribution and q the policy's. KL(p || q) at beta 0, KL(q || p) at beta 1.

    Both are known for the teacher's likeliest ids, of which a token has fewer where log-probs of `reference` are -inf. All others
    count as one outcome (bucket), or not at all (drop).
    """
    assert policy.candidates is not None, "asked for by `candidates`"
    assert reference.candidates is not None, "asked for by `candidates`"
    mask, p, q = policy.mask, reference.candidates, policy.candidates
    mass, known_ids = p.exp().sum(-1), p != -torch.inf
    if tail == "bucket":
        q = torch.where(known_ids, q, -torch.inf)
        p, q = (torch.cat([known, _rest(known)], -1) for known in (p, q))
        known_ids = p != -torch.inf
    p, q = (torch.where(known_ids, known, 0.0) for known in (p, q))
    values = torch.where(mask, torch.where(known_ids, _divergence(p, q, beta), 0.0).sum(-1), 0.0)
    metrics = {"nll": Mean.of(-policy.values, mask), "teacher/nll": Mean.of(-reference.values, mask & ~reference.values.isnan()),
               "teacher/mass": Mean.of(mass, mask)}  # fmt: skip
    return Loss(values, metrics, per="token")


def _rest(logps: Tensor) -> Tensor:
    """The log of the probability of all ids but these: (..., k) -> (..., 1)."""
    return (1 - logps.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()


def _divergence(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The terms of the divergence, of log-probs: (..., outcomes)."""
    if beta == 0:
        return p.exp() * (p - q)
    if beta == 1:
        return q.exp() * (q - p)
    middle = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * p.exp() * (p - middle) + (1 - beta) * q.exp() * (q - middle)
