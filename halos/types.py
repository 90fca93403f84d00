"""The data types of training: examples -> packed sequences of token ids -> token log-probs -> a loss's values and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from halos.ranges import Range as Range  # re-exported: a user's own loss imports all it needs from here

Message = Mapping[str, Any]  # OpenAI-style: role, content, and optionally tool_calls, name, tool_call_id
Turns = tuple[Message, ...]


# --- examples: parsed rows of data files, before tokenization ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A completion to imitate. Only the assistant turns of `completion` are trained on."""

    prompt: Turns
    completion: Turns


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two completions of one prompt, the first preferred; `margin` is by how much, where the data says."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """A completion with a binary label: desirable or not."""

    prompt: Turns
    completion: Turns
    desirable: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """A sampled completion and its reward.

    `ids` and `logps`, where the sampler kept them, are its tokens and their log-probs: tokenising the text again need not give
    the ids that were sampled. `vocabulary` identifies the tokenizer of the ids.
    """

    prompt: Turns
    completion: Turns
    reward: float
    ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    vocabulary: str | None = None


Example = Demonstration | Comparison | Judgement | Scored


# --- model inputs: sequences packed end to end, without padding --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sequences:
    """Sequences packed end to end. Scored tokens: those whose log-prob the loss reads. Prompt tokens never reach the LM head."""

    ids: Tensor  # (tokens,) int64
    positions: Tensor  # (tokens,) int64, restarting at 0 in each sequence
    lengths: tuple[int, ...]  # one per sequence; on the host, so that no kernel waits for it
    targets: Tensor  # (scored,) int64: the ids of the scored tokens
    sources: Tensor  # (scored,) int64: index into `ids` of the hidden state that predicts each target
    rows: Tensor  # (scored,) int64: which sequence each target belongs to
    columns: Tensor  # (scored,) int64: index of each target among the scored tokens of its sequence
    widest: int  # largest number of scored tokens of any sequence

    def to(self, device: torch.device) -> Sequences:
        ids, positions, targets, sources, rows, columns = (
            tensor.to(device, non_blocking=True)
            for tensor in (self.ids, self.positions, self.targets, self.sources, self.rows, self.columns)
        )
        return Sequences(ids, positions, self.lengths, targets, sources, rows, columns, self.widest)


@dataclass(frozen=True, slots=True)
class Whole:
    """One sequence for the unmodified transformers forward: passed in the place of `Sequences` through DDP, FSDP and the like."""

    ids: Tensor  # (tokens,) int64


# --- inputs of a loss --------------------------------------------------------------------------------------------------


class LossInput:
    """Base of the types that a loss may take first. A subclass declares what follows for data, proof, model and rollouts.

    A trainer lists it in `takes` (trainers/, registered in run/blueprint.py), and run/measured.py makes a small random one.
    """

    __slots__ = ()
    example: ClassVar[type]  # the type of example that it is computed from
    feedback: ClassVar[str] = "scalar"  # made from scored samples online: pairwise, binary, or the scores themselves
    head: ClassVar[Literal["language", "value", "score"]] = "language"  # the head on the model's hidden states
    sampled: ClassVar[bool] = False  # its rows are rollouts, whose advantages the loss's module computes


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


# FSDP finds the tensors of a module's output through pytrees; their gradients trigger its all-gather in the backward pass
register_pytree_node(TokenLogps, lambda logps: ([logps.values, logps.mask], None), lambda parts, _: TokenLogps(*parts))


@dataclass(frozen=True, slots=True)
class Pair(LossInput):
    """Log-probs of the chosen and the rejected completions; row i of both answers the same prompt."""

    example, feedback = Comparison, "pairwise"

    chosen: TokenLogps
    rejected: TokenLogps

    def detach(self) -> Pair:
        return Pair(self.chosen.detach(), self.rejected.detach())


@dataclass(frozen=True, slots=True)
class Labelled(LossInput):
    """Log-probs of completions with binary labels."""

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
    """A reward model's scores of the chosen and the rejected completion; `margin` is 0 where the data has none."""

    example, feedback, head = Comparison, "pairwise", "score"

    chosen: Tensor  # (rows,)
    rejected: Tensor  # (rows,)
    margin: Tensor  # (rows,)

    def detach(self) -> PairScores:
        return PairScores(self.chosen.detach(), self.rejected.detach(), self.margin)


@dataclass(frozen=True, slots=True)
class Rollouts(LossInput):
    """Sampled completions with rewards and advantages. Tensors over time are 0 where `logps.mask` is False."""

    example, sampled = Scored, True

    logps: TokenLogps  # under the policy in training
    old: Tensor  # (rows, time) log-probs under the policy that sampled them
    advantages: Tensor  # (rows, time)
    rewards: Tensor  # (rows,)


@dataclass(frozen=True, slots=True)
class ValuedRollouts(LossInput):
    """Rollouts with the value of the state before each token. A loss that takes them gets a value head on its policy."""

    example, head, sampled = Scored, "value", True

    logps: TokenLogps
    old: Tensor  # (rows, time)
    advantages: Tensor  # (rows, time)
    rewards: Tensor  # (rows,)
    values: Tensor  # (rows, time) under the value head in training
    old_values: Tensor  # (rows, time) under the value head before training on these rollouts
    returns: Tensor  # (rows, time) regression targets of the values


INPUTS = (TokenLogps, Pair, Labelled, PairScores, Rollouts, ValuedRollouts)


@dataclass(frozen=True, slots=True)
class Acted:
    """Output of a model with a value head: log-probs of the scored tokens, and the value of the state before each."""

    logps: TokenLogps
    values: Tensor  # (rows, time) float32; 0 where the mask is False


register_pytree_node(Acted, lambda acted: ([acted.logps, acted.values], None), lambda parts, _: Acted(*parts))


@dataclass(frozen=True, slots=True)
class Sampled:
    """A global batch of rollouts from which advantages are computed: whole groups, each the samples of one prompt."""

    rewards: Tensor  # (rows,) float64
    groups: Tensor  # (rows,) int64; samples of one prompt share a number
    old: TokenLogps  # (rows, time)
    reference: Tensor | None  # (rows, time) log-probs under the reference, where the loss uses one
    values: Tensor | None  # (rows, time), where there is a value head


@dataclass(frozen=True, slots=True)
class Estimates:
    """Result of a loss's function `advantages` over a global batch."""

    advantages: Tensor  # (rows, time); 0 outside the mask
    returns: Tensor | None  # (rows, time) regression targets of a value head
    metrics: Mapping[str, Mean]


# --- results of a loss -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mean:
    """A total and its count, kept separate so that a mean over micro-batches and ranks is exact."""

    total: Tensor  # ()
    count: Tensor  # ()

    @classmethod
    def of(cls, values: Tensor, where: Tensor | None = None) -> Mean:
        """The mean of `values`, or of those where the boolean `where` is true; both have the same shape."""
        values = values.detach().float()
        if where is None:
            return cls(values.sum(), values.new_full((), values.numel()))
        return cls(torch.where(where, values, 0.0).sum(), where.sum().float())


@dataclass(frozen=True, slots=True)
class Loss:
    """Unreduced: the trainer sums `values` and divides by a denominator counted over the whole global batch.

    `per` chooses that denominator: the items of the global batch (pairs, examples), or their scored tokens.
    """

    values: Tensor  # (rows,) or (rows, time)
    metrics: Mapping[str, Mean]
    per: Literal["item", "token"] = "item"  # the denominator
