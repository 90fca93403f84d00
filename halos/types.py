"""The data types of training: examples -> packed sequences of token ids -> token log-probs -> a loss's values and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import register_pytree_node

from halos.examples import Comparison, Demonstration, Example, Item, Judgement, Message, PackRow, Scored, Stepwise, Turns  # noqa: F401
from halos.loss_result import Loss, Mean  # noqa: F401
from halos.ranges import Range as Range  # re-exported, as examples are: a user's own loss imports all it needs from here
from halos.sequences import HostSequences, Sequences, Tree, WholeModelInput  # noqa: F401
from halos.transfer import to_device

TOKEN_STATISTICS = ("entropy", "log_sum_squares")  # of the distribution of a scored token

# --- inputs of a loss --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LossInput:
    """Base of the types that a loss may take first. A subclass declares all that follows for data, model, trainer and rollouts.

    A subclass is a frozen dataclass in any module, registered nowhere: a loss names it by the annotation of its first parameter.
    """

    example: ClassVar[type[Example]]  # the type of example that it is computed from
    feedback: ClassVar[str] = "scalar"  # made online from samples with scores: pairwise, binary, or the scores themselves
    head: ClassVar[Literal["language", "value", "score", "steps"]] = "language"  # the head on the model's hidden states
    trainer: ClassVar[str] = "halos.trainers.base.Trainer"  # the class that trains a loss on it
    token_statistics: ClassVar[tuple[str, ...]] = ()  # of TOKEN_STATISTICS: what its TokenLogps have besides log-probs

    @classmethod
    def rows(cls, items: Sequence[Item]) -> list[PackRow]:
        """The sequences that the model sees for a micro-batch: every item's first completion, then every item's second."""
        return [(item.prompt, item.completions[which]) for which in range(len(items[0].completions)) for item in items]

    @classmethod
    def of(cls, output: Any, items: Sequence[Item]) -> Self:
        """Build from the model's output over `rows(items)`: TokenLogps; with a value head Acted; with a score head
        (rows,); of steps two logits at each scored token, (rows, time, 2)."""
        raise NotImplementedError(f"{cls.__name__} has no `of`")

    @staticmethod
    def derived(means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are functions of other metrics' means."""
        return {}

    def detach(self) -> Self:
        parts = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: part.detach() for name, part in parts.items() if part is not None})


@dataclass(frozen=True, slots=True)
class TokenLogps(LossInput):
    """Log-probabilities of the scored tokens, float32; 0 where `mask` is False.

    The distribution of each token, of which they are the log-probs, has the statistics that the loss's input type declares.
    """

    example, feedback = Demonstration, "binary"

    values: Tensor  # (rows, time)
    mask: Tensor  # (rows, time) bool
    entropy: Tensor | None = None  # (rows, time) in nats
    log_sum_squares: Tensor | None = None  # (rows, time) the log of the probability that two draws are equal
    candidates: Tensor | None = None  # (rows, time, k) log-probs of further ids
    ids: Tensor | None = None  # (rows, time, k) int64: those ids, of a reference that has chosen them

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
        parts, names = _tensors(self)
        first, rest = zip(*((part[:rows], part[rows:]) for part in parts), strict=True)
        return TokenLogps(**dict(zip(names, first, strict=True))), TokenLogps(**dict(zip(names, rest, strict=True)))

    @classmethod
    def of(cls, output: TokenLogps, items: Sequence[Item]) -> TokenLogps:
        return output

    @staticmethod
    def derived(means: Mapping[str, float]) -> dict[str, float]:
        """Of a loss with the metric nll, the mean of -log pi over the scored tokens."""
        return {"perplexity": math.exp(min(means["nll"], 700.0))} if "nll" in means else {}


# FSDP finds the tensors of a module's output through pytrees; their gradients trigger its all-gather in the backward pass
def _tensors(logps: TokenLogps) -> tuple[list[Tensor], tuple[str, ...]]:
    parts = {each.name: getattr(logps, each.name) for each in fields(logps)}
    present = {name: part for name, part in parts.items() if part is not None}
    return list(present.values()), tuple(present)


register_pytree_node(TokenLogps, _tensors, lambda parts, names: TokenLogps(**dict(zip(names, parts, strict=True))))


@dataclass(frozen=True, slots=True)
class Pair(LossInput):
    """Log-probs of the chosen and the rejected completions; row i of both answers the same prompt."""

    example, feedback = Comparison, "pairwise"

    chosen: TokenLogps
    rejected: TokenLogps

    @classmethod
    def of(cls, output: TokenLogps, items: Sequence[Item]) -> Pair:
        return cls(*output.split(len(items)))


@dataclass(frozen=True, slots=True)
class Labelled(LossInput):
    """Log-probs of completions with binary labels."""

    example, feedback = Judgement, "binary"

    completion: TokenLogps
    desirable: Tensor  # (rows,) bool

    @classmethod
    def of(cls, output: TokenLogps, items: Sequence[Item]) -> Labelled:
        desirable = torch.tensor([item.labels["desirable"] > 0 for item in items])
        return cls(output, to_device(desirable, output.values.device))

    @staticmethod
    def derived(means: Mapping[str, float]) -> dict[str, float]:
        both = "rewards/chosen" in means and "rewards/rejected" in means
        return {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]} if both else {}


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

    @classmethod
    def of(cls, output: Tensor, items: Sequence[Item]) -> PairScores:
        margin = torch.tensor([item.labels["margin"] for item in items], dtype=torch.float32)
        return cls(output[: len(items)], output[len(items) :], to_device(margin, output.device))


@dataclass(frozen=True, slots=True)
class StepScores(LossInput):
    """A process reward model's scores of the steps of completions; all are 0 where `mask` is False."""

    example, head = Stepwise, "steps"

    scores: Tensor  # (rows, time) the log-odds that a step is right: its two logits, the second less the first
    mask: Tensor  # (rows, time) bool: where a row has a step with a label
    labels: Tensor  # (rows, time) float32, from 0 to 1

    @classmethod
    def of(cls, output: Tensor, items: Sequence[Item]) -> StepScores:
        parts = [torch.from_numpy(item.step_labels.copy()) for item in items if item.step_labels is not None]
        assert len(parts) == len(items), "items of a Stepwise have labels of their steps"
        width = output.shape[1]
        labels = torch.stack([pad(part, (0, width - len(part))) for part in parts])
        mask = torch.arange(width) < torch.tensor([len(part) for part in parts])[:, None]
        return cls(output[..., 1] - output[..., 0], to_device(mask, output.device), to_device(labels, output.device))


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Rollouts as the trainer knows them before the policy's forward pass."""

    old: Tensor  # (rows, time) log-probs under the policy that sampled; the trainer's own if `old_is_own`, else the sampler's
    sampled: Tensor | None  # (rows, time) the sampler's log-probs, NaN where unknown
    rewards: Tensor  # (rows,)
    advantages: Tensor  # (rows, time)
    reference: Tensor | None  # (rows, time) log-probs under the reference, where the loss compares with one
    returns: Tensor | None  # (rows, time), of a loss whose advantages give them
    values: Tensor | None  # (rows, time) of the value head as it was when the rollouts were read
    metrics: Mapping[str, Mean]  # of the whole global batch, in each rank's first micro-batch alone: counted once
    first_pass: bool = False  # the policy in training is still the one that sampled
    old_is_own: bool = True


@dataclass(frozen=True, slots=True)
class RolloutInput(LossInput):
    """Base of the input types of losses on rollouts, whose modules compute the advantages of whole global batches."""

    example = Scored
    trainer = "halos.trainers.policy_gradient.PolicyGradientTrainer"

    logps: TokenLogps  # under the policy in training

    @classmethod
    def of_rollouts(cls, output: Any, batch: RolloutBatch) -> Self:
        """Build from the model's output and the same rows of a batch, cut to the output's width."""
        raise NotImplementedError(f"{cls.__name__} has no `of_rollouts`")


@dataclass(frozen=True, slots=True)
class Rollouts(RolloutInput):
    """Sampled completions with rewards and advantages. Tensors over time are 0 where `logps.mask` is False."""

    old: Tensor  # (rows, time) log-probs under the policy that sampled them; on the first pass `logps` itself, without gradient
    advantages: Tensor  # (rows, time)
    rewards: Tensor  # (rows,)

    @classmethod
    def of_rollouts(cls, output: TokenLogps, batch: RolloutBatch) -> Rollouts:
        return cls(output, batch.old, batch.advantages, batch.rewards)


@dataclass(frozen=True, slots=True)
class ValuedRollouts(RolloutInput):
    """Rollouts with the value of the state before each token. A loss that takes them gets a value head on its policy."""

    head = "value"

    old: Tensor  # (rows, time)
    advantages: Tensor  # (rows, time)
    rewards: Tensor  # (rows,)
    values: Tensor  # (rows, time) under the value head in training
    old_values: Tensor  # (rows, time) under the value head before training on these rollouts
    returns: Tensor  # (rows, time) regression targets of the values

    @classmethod
    def of_rollouts(cls, output: Acted, batch: RolloutBatch) -> ValuedRollouts:
        assert batch.values is not None, "the model has a value head"
        assert batch.returns is not None, "the trainer has asked for them"
        old, known = (batch.old, batch.advantages, batch.rewards), (batch.values, batch.returns)
        return cls(output.logps, *old, output.values, *known)


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
    old: TokenLogps  # (rows, time) the trainer's own where it computes them beforehand, else the sampler's
    reference: Tensor | None  # (rows, time) log-probs under the reference, where the loss uses one
    values: Tensor | None  # (rows, time), where there is a value head


@dataclass(frozen=True, slots=True)
class Estimates:
    """Result of a loss's function `advantages` over a global batch."""

    advantages: Tensor  # (rows, time); 0 outside the mask
    returns: Tensor | None  # (rows, time) regression targets of a value head
    metrics: Mapping[str, Mean]
