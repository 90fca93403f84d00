"""The shapes that flow: examples -> token ids -> packed sequences -> token log-probs -> a loss's values and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

Message = Mapping[str, Any]  # OpenAI-style: role, content, and where they occur tool_calls, name, tool_call_id
Turns = tuple[Message, ...]


# --- examples: what a row of data says, before any tokenizer -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A completion worth imitating. Only assistant turns of `completion` are scored."""

    prompt: Turns
    completion: Turns


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two completions of one prompt, the first preferred; `margin` says by how much, where it is known."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """A completion that was judged on its own: desirable or not."""

    prompt: Turns
    completion: Turns
    desirable: bool


Example = Demonstration | Comparison | Judgement


# --- what the model is fed: sequences laid end to end, nothing padded --------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sequences:
    """Sequences packed end to end. Scored tokens are those of completions: prompt tokens never meet the LM head."""

    ids: Tensor  # (tokens,) int64
    positions: Tensor  # (tokens,) int64, restarting at 0 in each sequence
    lengths: tuple[int, ...]  # one per row; on the host, so that no kernel waits for it
    targets: Tensor  # (scored,) int64: the ids of the scored tokens
    sources: Tensor  # (scored,) int64: where in `ids` the hidden state stands that predicts each target
    rows: Tensor  # (scored,) int64: which sequence each target belongs to
    columns: Tensor  # (scored,) int64: its place among the scored tokens of that sequence
    widest: int  # scored tokens of the sequence that has the most

    def to(self, device: torch.device) -> Sequences:
        ids, positions, targets, sources, rows, columns = (
            tensor.to(device, non_blocking=True)
            for tensor in (self.ids, self.positions, self.targets, self.sources, self.rows, self.columns)
        )
        return Sequences(ids, positions, self.lengths, targets, sources, rows, columns, self.widest)


# --- what a loss is given ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenLogps:
    """Log-probabilities of the scored tokens, float32; 0 where `mask` is False."""

    values: Tensor  # (rows, time)
    mask: Tensor  # (rows, time) bool

    @property
    def sum(self) -> Tensor:
        """log pi(y|x) of each row: (rows,)."""
        return self.values.sum(-1)

    @property
    def length(self) -> Tensor:
        """Scored tokens of each row, the end token included: (rows,)."""
        return self.mask.sum(-1)

    @property
    def mean(self) -> Tensor:
        """log pi(y|x) / |y| of each row: (rows,)."""
        return self.sum / self.length.clamp(min=1)

    def split(self, rows: int) -> tuple[TokenLogps, TokenLogps]:
        """The first `rows` rows, and the rest."""
        return TokenLogps(self.values[:rows], self.mask[:rows]), TokenLogps(self.values[rows:], self.mask[rows:])

    def detach(self) -> TokenLogps:
        return TokenLogps(self.values.detach(), self.mask)


# FSDP finds the tensors of a module's output, whose gradients tell it when to gather parameters again, through pytrees
register_pytree_node(TokenLogps, lambda logps: ([logps.values, logps.mask], None), lambda parts, _: TokenLogps(*parts))


@dataclass(frozen=True, slots=True)
class Pair:
    """Log-probs of the chosen and the rejected completion of the same prompts, row by row."""

    chosen: TokenLogps
    rejected: TokenLogps

    def detach(self) -> Pair:
        return Pair(self.chosen.detach(), self.rejected.detach())


@dataclass(frozen=True, slots=True)
class Labelled:
    """Log-probs of completions that were judged one by one."""

    completion: TokenLogps
    desirable: Tensor  # (rows,) bool

    def detach(self) -> Labelled:
        return Labelled(self.completion.detach(), self.desirable)


@dataclass(frozen=True, slots=True)
class Mismatched:
    """Log-probs, under each row's prompt, of a completion that answers a different prompt (KTO's estimate of the KL)."""

    completion: TokenLogps


@dataclass(frozen=True, slots=True)
class PairScores:
    """Scores of a reward model for the chosen and the rejected completion; `margin` is 0 where the data names none."""

    chosen: Tensor  # (rows,)
    rejected: Tensor  # (rows,)
    margin: Tensor  # (rows,)

    def detach(self) -> PairScores:
        return PairScores(self.chosen.detach(), self.rejected.detach(), self.margin)


# --- what a loss gives back --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mean:
    """A total and the count it is over, kept apart so that a mean over micro-batches and ranks is exact."""

    total: Tensor  # ()
    count: Tensor  # ()

    @classmethod
    def of(cls, values: Tensor, where: Tensor | None = None) -> Mean:
        """The mean of `values`, or of those that the boolean `where` selects; both of one shape."""
        values = values.detach().float()
        if where is None:
            return cls(values.sum(), values.new_full((), values.numel()))
        return cls(torch.where(where, values, 0.0).sum(), where.sum().float())


@dataclass(frozen=True, slots=True)
class Loss:
    """Unreduced: the trainer sums `values` and divides by the count of the whole global batch.

    `per` says what the mean is over: items of the global batch (pairs, examples), or their scored tokens.
    """

    values: Tensor  # (rows,) or (rows, time)
    metrics: Mapping[str, Mean]
    per: Literal["item", "token"] = "item"


# --- what a knob may be ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a loss's or hook's knob, written `Annotated[float, Range(above=0)]`; checked before any model loads."""

    above: float | None = None  # exclusive
    least: float | None = None
    below: float | None = None  # exclusive
    most: float | None = None

    def violated_by(self, value: float) -> str | None:
        """What the value should have been, or None where it is fine."""
        bounds = [
            ("above", self.above, value > (self.above or 0)),
            ("at least", self.least, value >= (self.least or 0)),
        ]
        bounds += [("below", self.below, value < (self.below or 0)), ("at most", self.most, value <= (self.most or 0))]
        wanted = [f"{word} {bound:g}" for word, bound, _ in bounds if bound is not None]
        return " and ".join(wanted) if any(bound is not None and not good for _, bound, good in bounds) else None
