"""What a loss may read of the distribution of each scored token: the log-prob of its target, entropy and more, with gradients.

One formula each, of float32 logits that are already divided by the temperature; p = softmax(logits):
- log p[target]
- the entropy, -sum p log p
- the log of sum p^2, the probability that two draws are equal
- log p of further ids, k of each token
- the ids of the k largest p, and their log p, without gradients
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.special import entr

from halos.types import TokenLogps


@dataclass(frozen=True, slots=True)
class Reading:
    """The ids to read of some rows of logits, and the statistics; the columns of the result are in the order of the fields."""

    targets: Tensor  # (rows,) int64
    entropy: bool = False
    log_sum_squares: bool = False
    candidates: Tensor | None = None  # (rows, k) int64
    top: int = 0  # of how many likeliest ids log-probs and ids are read, without gradients
    below: int | None = None  # ids from which on none is among them

    @classmethod
    def of(cls, targets: Tensor, statistics: Sequence[str] = (), candidates: Tensor | None = None) -> "Reading":
        return cls(targets, "entropy" in statistics, "log_sum_squares" in statistics, candidates)

    @property
    def is_logp_alone(self) -> bool:
        return not (self.entropy or self.log_sum_squares or self.candidates is not None or self.top)

    @property
    def width(self) -> int:
        """The number of columns."""
        further = 2 * self.top if self.candidates is None else self.candidates.shape[1]
        return 1 + self.entropy + self.log_sum_squares + further

    def split(self, rows: int) -> list["Reading"]:
        """In chunks of rows."""
        targets = self.targets.split(rows)
        candidates = [None] * len(targets) if self.candidates is None else self.candidates.split(rows)
        return [replace(self, targets=some, candidates=ids) for some, ids in zip(targets, candidates, strict=True)]

    def values(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits (rows, vocabulary) -> (rows, width) float32, and their logsumexp (rows,)."""
        norms = logits.logsumexp(-1)
        columns = [logits.gather(-1, self.targets[:, None])[:, 0] - norms]
        if self.entropy:
            columns.append(entr((logits - norms[:, None]).exp_()).sum(-1))
        if self.log_sum_squares:
            columns.append((logits - norms[:, None]).mul_(2).logsumexp(-1))
        if self.candidates is not None:
            columns.extend((logits.gather(-1, self.candidates) - norms[:, None]).unbind(-1))
        if self.top:
            largest, ids = logits[:, : self.below].topk(self.top)
            columns.extend([*(largest - norms[:, None]).unbind(-1), *ids.to(logits.dtype).unbind(-1)])  # exact below 2^24
        return torch.stack(columns, -1), norms

    def gradient(self, logits: Tensor, norms: Tensor, values: Tensor, grads: Tensor) -> Tensor:
        """The gradient with respect to the logits: of `values` (rows, width), whose gradients are `grads`. Overwrites `logits`.

        d log p[t]/dz = 1[t] - p, d entropy/dz = -p (log p + entropy), d log sum p^2/dz = 2 (p^2 / sum p^2 - p).
        """
        assert not self.top, "these have no gradients"
        grad_logps, grad_entropy, grad_squares, grad_candidates = self._columns(grads)
        _, entropy, log_squares, _ = self._columns(values)
        probs = logits.sub_(norms[:, None]).exp_()
        factor, more = -grad_logps, None
        if grad_entropy is not None and entropy is not None:
            factor, more = factor - grad_entropy * entropy, entr(probs).mul_(grad_entropy)
        if grad_squares is not None and log_squares is not None:
            squares = probs.square().mul_(2 * grad_squares * (-log_squares).exp())
            factor, more = factor - 2 * grad_squares, squares if more is None else more.add_(squares)
        if grad_candidates is not None:
            factor = factor - grad_candidates.sum(-1, keepdim=True)
        gradient = probs.mul_(factor)
        gradient = gradient if more is None else gradient.add_(more)
        if grad_candidates is not None and self.candidates is not None:
            gradient.scatter_add_(-1, self.candidates, grad_candidates)
        return gradient.scatter_add_(-1, self.targets[:, None], grad_logps)

    def _columns(self, table: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The columns of a (rows, width) table: (rows, 1) each, (rows, k) of the candidates, None of what is not read."""
        entropy = table[:, 1:2] if self.entropy else None
        after = 1 + self.entropy
        squares = table[:, after : after + 1] if self.log_sum_squares else None
        return table[:, :1], entropy, squares, table[:, after + self.log_sum_squares :] if self.candidates is not None else None

    def token_logps(self, padded: Tensor, mask: Tensor) -> TokenLogps:
        """(rows, time, width), 0 where `mask` is False -> each column as (rows, time)."""
        entropy = padded[..., 1] if self.entropy else None
        after = 1 + self.entropy
        squares = padded[..., after] if self.log_sum_squares else None
        further = padded[..., after + self.log_sum_squares :]
        if self.top:
            return TokenLogps(padded[..., 0], mask, entropy, squares, further[..., : self.top], further[..., self.top :].long())
        return TokenLogps(padded[..., 0], mask, entropy, squares, further if self.candidates is not None else None)


def read(logits: Tensor, reading: Reading) -> Tensor:
    """logits (rows, vocabulary) float32 -> (rows, width), with gradients."""
    return _Read.apply(logits, reading)


class _Read(torch.autograd.Function):
    """Exact where a probability is 0 too, whose log autograd would multiply by 0."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reading: Reading) -> Tensor:
        values, norms = reading.values(logits)
        ctx.save_for_backward(logits, norms, values)
        ctx.reading = reading
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        logits, norms, values = ctx.saved_tensors
        return ctx.reading.gradient(logits.clone(), norms, values, grad_outputs[0]), None
