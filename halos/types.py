"""The shapes that flow: examples -> token ids -> packed sequences -> token log-probs -> a loss's values and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from halos.ranges import Range as Range  # beside the rest of what a loss of one's own is written with

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


@dataclass(frozen=True, slots=True)
class Scored:
    """A completion that was sampled, and its reward.

    `ids` and `logps`, where the sampler kept them, are its tokens and their log-probs: text need not tokenise to what was
    sampled. `vocabulary` names the tokenizer that the ids are of.
    """

    prompt: Turns
    completion: Turns
    reward: float
    ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    vocabulary: str | None = None


Example = Demonstration | Comparison | Judgement | Scored


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


@dataclass(frozen=True, slots=True)
class Whole:
    """One row for the model as it is by itself: in the place of `Sequences`, it goes the same way through what wraps a model."""

    ids: Tensor  # (tokens,) int64


# --- what a loss is given ----------------------------------------------------------------------------------------------


class LossInput:
    """What a loss may take first, and what follows from that for data, proof, model and rollouts, declared by a subclass.

    Besides, a trainer `takes` it (trainers/, listed in run/blueprint.py), and run/measured.py makes one up.
    """

    __slots__ = ()
    example: ClassVar[type]  # what of the data it is computed from
    feedback: ClassVar[str] = "scalar"  # what is made of scored samples for it: pairwise, binary, or the scores themselves
    head: ClassVar[Literal["language", "value", "score"]] = "language"  # what the model is read through
    sampled: ClassVar[bool] = False  # whether its rows are rollouts, whose advantages the loss says


@dataclass(frozen=True, slots=True)
class TokenLogps(LossInput):
    """Log-probabilities of the scored tokens, float32; 0 where `mask` is False."""

    example, feedback = Demonstration, "binary"

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
class Pair(LossInput):
    """Log-probs of the chosen and the rejected completion of the same prompts, row by row."""

    example, feedback = Comparison, "pairwise"

    chosen: TokenLogps
    rejected: TokenLogps

    def detach(self) -> Pair:
        return Pair(self.chosen.detach(), self.rejected.detach())


@dataclass(frozen=True, slots=True)
class Labelled(LossInput):
    """Log-probs of completions that were judged one by one."""

    example, feedback = Judgement, "binary"

    completion: TokenLogps
    desirable: Tensor  # (rows,) bool

    def detach(self) -> Labelled:
        return Labelled(self.completion.detach(), self.desirable)


@dataclass(frozen=True, slots=True)
class Mismatched:
    """Log-probs, under each row's prompt, of a completion that answers a different prompt (KTO's estimate of the KL)."""

    completion: TokenLogps


@dataclass(frozen=True, slots=True)
class PairScores(LossInput):
    """Scores of a reward model for the chosen and the rejected completion; `margin` is 0 where the data names none."""

    example, feedback, head = Comparison, "pairwise", "score"

    chosen: Tensor  # (rows,)
    rejected: Tensor  # (rows,)
    margin: Tensor  # (rows,)

    def detach(self) -> PairScores:
        return PairScores(self.chosen.detach(), self.rejected.detach(), self.margin)


@dataclass(frozen=True, slots=True)
class Rollouts(LossInput):
    """Completions that were sampled, and what is known of each. Tensors over time are 0 where `logps.mask` is False."""

    example, sampled = Scored, True

    logps: TokenLogps  # under the policy in training
    old: Tensor  # (rows, time) log-probs under the policy that sampled them
    advantages: Tensor  # (rows, time)
    rewards: Tensor  # (rows,)


@dataclass(frozen=True, slots=True)
class ValuedRollouts(LossInput):
    """Rollouts, and what a value head makes of the state before each token. A loss that takes them is given such a head."""

    example, head, sampled = Scored, "value", True

    logps: TokenLogps
    old: Tensor  # (rows, time)
    advantages: Tensor  # (rows, time)
    rewards: Tensor  # (rows,)
    values: Tensor  # (rows, time) of the head in training
    old_values: Tensor  # (rows, time) of the head as it was when the rollouts were read
    returns: Tensor  # (rows, time) what the values should have been


INPUTS = (TokenLogps, Pair, Labelled, PairScores, Rollouts, ValuedRollouts)


@dataclass(frozen=True, slots=True)
class Acted:
    """What a model with a value head gives: log-probs of the scored tokens, and the value of the state before each."""

    logps: TokenLogps
    values: Tensor  # (rows, time) float32; 0 where the mask is False


register_pytree_node(Acted, lambda acted: ([acted.logps, acted.values], None), lambda parts, _: Acted(*parts))


@dataclass(frozen=True, slots=True)
class Sampled:
    """A global batch of rollouts as they came: whole groups of one prompt each. What advantages are made of."""

    rewards: Tensor  # (rows,) float64
    groups: Tensor  # (rows,) int64; samples of one prompt share a number
    old: TokenLogps  # (rows, time)
    reference: Tensor | None  # (rows, time) log-probs under the reference, where the loss compares with one
    values: Tensor | None  # (rows, time), where there is a value head


@dataclass(frozen=True, slots=True)
class Estimates:
    """What a loss's function `advantages` makes of a global batch."""

    advantages: Tensor  # (rows, time); 0 outside the mask
    returns: Tensor | None  # (rows, time) for a value head to learn
    metrics: Mapping[str, Mean]


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
