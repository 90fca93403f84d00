"""Examples, which are parsed rows of data files, and items, which are examples as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

Message = Mapping[str, Any]  # OpenAI-style: role, content, and optionally tool_calls, name, tool_call_id
Turns = tuple[Message, ...]

TEXT = "text"  # the role of a turn that is trained on as it is, without a chat template; it has no prompt


# --- examples: parsed rows of data files, before tokenization ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """A completion as its sampler knew it: tokenising the text again need not give the ids that were sampled."""

    ids: tuple[int, ...] = ()  # the end token included where it was sampled; empty where the sampler returned text alone
    vocabulary: str | None = None  # identifies the tokenizer of the ids
    cut: bool = False  # at the sampler's max_new_tokens: it has no end token, and none is added to its text


@dataclass(frozen=True, slots=True, eq=False)
class TeacherLogps:
    """What a teacher says of the scored tokens of a completion."""

    table: np.ndarray  # (tokens, 1 + 2 k) float32: log-prob of the token, nan if unknown; of k ids, -inf if fewer; the ids
    vocabulary: str | None = None  # identifies the tokenizer of the ids
    row: str | None = None  # the hash of the row that the teacher has read
    temperature: float | None = None  # by which its logits were divided


@dataclass(frozen=True, slots=True)
class Example:
    """Base of the example types: a prompt, completions of it, and numbers. A subclass declares which of its fields are which."""

    completed: ClassVar[tuple[str, ...]] = ("completion",)  # the fields that are completions, in the order of Item.completions
    labels: ClassVar[tuple[str, ...]] = ()  # the fields that are numbers, which become Item.labels; None becomes 0
    columns: ClassVar[str] = ""  # the data that losses on such examples learn from, for messages
    trains: ClassVar[str] = ""  # the losses that such examples can train, for messages

    prompt: Turns

    @property
    def completions(self) -> tuple[Turns, ...]:
        return tuple(getattr(self, name) for name in self.completed)

    @property
    def sampled(self) -> tuple[SampledTokens, ...]:
        """The tokens of each completion as they were sampled; empty where these are not known."""
        return ()

    def numbers(self) -> dict[str, float]:
        """The fields that are labels, as Item.labels."""
        values = {name: getattr(self, name) for name in self.labels}
        return {name: 0.0 if value is None else float(value) for name, value in values.items()}

    @classmethod
    def of(cls, other: Example) -> Sequence[Example] | None:
        """Convert `other` to examples of this type: none where this one has nothing to give, None where its type never can."""
        return [other] if type(other) is cls else None


@dataclass(frozen=True, slots=True)
class Demonstration(Example):
    """A completion to imitate. Only the assistant turns of `completion` are trained on."""

    columns = "demonstrations: messages, or prompt + completion"
    trains = "only losses on demonstrations, such as sft"

    completion: Turns
    sampled: tuple[SampledTokens, ...] = field(default=(), kw_only=True)
    teacher_logps: TeacherLogps | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, other: Example) -> Sequence[Example] | None:
        match other:
            case Comparison(prompt, chosen):
                return [Demonstration(prompt, chosen, sampled=other.sampled[:1])]
            case Judgement(prompt, completion, desirable):
                return [Demonstration(prompt, completion, sampled=other.sampled)] if desirable else []
            case Scored(prompt, completion):
                learned = says_something(completion) and not other.masked
                return [Demonstration(prompt, completion, sampled=other.sampled)] if learned else []
        return [other] if type(other) is cls else None


@dataclass(frozen=True, slots=True)
class Comparison(Example):
    """Two completions of one prompt, the first preferred; `margin` is by how much, where the data says."""

    completed, labels = ("chosen", "rejected"), ("margin",)
    columns = "pairs: prompt + chosen + rejected (or chosen + rejected as messages that share their first turns)"
    trains = "losses on pairs, such as dpo, on labels, such as kto, on rollouts, such as grpo, and on demonstrations, such as sft"

    chosen: Turns
    rejected: Turns
    margin: float | None = None
    sampled: tuple[SampledTokens, ...] = field(default=(), kw_only=True)

    @property
    def is_tie(self) -> bool:
        """Equal completions, of which neither is preferred."""
        return self.chosen == self.rejected

    @classmethod
    def of(cls, other: Example) -> Sequence[Example] | None:
        return ([] if other.is_tie else [other]) if isinstance(other, Comparison) else None


@dataclass(frozen=True, slots=True)
class Judgement(Example):
    """A completion with a binary label: desirable or not."""

    labels = ("desirable",)
    columns = "labels: prompt + completion + label, or pairs"
    trains = "losses on labels, such as kto, on rollouts, such as grpo, and on demonstrations, such as sft"

    completion: Turns
    desirable: bool
    sampled: tuple[SampledTokens, ...] = field(default=(), kw_only=True)

    @classmethod
    def of(cls, other: Example) -> Sequence[Example] | None:
        if isinstance(other, Comparison):
            both = (Judgement(other.prompt, other.chosen, True, sampled=other.sampled[:1]),
                    Judgement(other.prompt, other.rejected, False, sampled=other.sampled[1:]))  # fmt: skip
            return [] if other.is_tie else both
        return [other] if type(other) is cls else None


@dataclass(frozen=True, slots=True)
class Scored(Example):
    """A sampled completion and its reward.

    `ids` and `logps`, where the sampler kept them, are its tokens and their log-probs: tokenising the text again need not give
    the ids that were sampled. `vocabulary` identifies the tokenizer of the ids.
    """

    labels = ("reward",)
    columns = "completions with rewards: scalar_feedback, or prompt + completion + reward; labels and pairs stand for 1 and -1"
    trains = "losses on rollouts, such as grpo and ppo, and sft; python -m halos.online.label makes pairs or labels of samples"

    completion: Turns
    reward: float
    ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    vocabulary: str | None = None
    cut: bool = field(default=False, kw_only=True)  # as that of SampledTokens
    masked: bool = field(default=False, kw_only=True)  # its reward counts in its group, and its tokens are not learned from
    temperature: float | None = field(default=None, kw_only=True)  # it was sampled at; 0: greedily, with log-probs at 1

    @property
    def sampled(self) -> tuple[SampledTokens, ...]:
        tokens = SampledTokens(self.ids, self.vocabulary, self.cut)
        return () if tokens == SampledTokens() else (tokens,)

    @classmethod
    def of(cls, other: Example) -> Sequence[Example] | None:
        """HALOs' reading of labels for PPO: 1 and -1."""
        match other:
            case Comparison():
                return [] if other.is_tie else [each for part in Judgement.of(other) or () for each in cls.of(part) or ()]
            case Judgement(prompt, completion, desirable):
                (tokens,) = other.sampled or (SampledTokens(),)
                reward = 1.0 if desirable else -1.0
                return [Scored(prompt, completion, reward, tokens.ids, (), tokens.vocabulary, cut=tokens.cut)]
        return [other] if type(other) is cls else None


@dataclass(frozen=True, slots=True)
class Stepwise(Example):
    """A completion in steps, and how likely each of them is right. A step's label is learned at the end of what follows it."""

    completed = ("steps",)
    columns = "steps with labels: prompt + completions (a list of steps) + labels (a list); labels and pairs stand for one step"
    trains = "only losses on steps, such as prm"

    steps: Turns  # a turn of the assistant's for each
    step_labels: tuple[float | None, ...]  # from 0, wrong, to 1, right; None: nothing is learned of that step
    separator: str = "\n"  # follows each step

    @classmethod
    def of(cls, other: Example) -> Sequence[Example] | None:
        """A completion with a label is one step, whose label is that of the whole (outcome supervision)."""
        match other:
            case Comparison():
                return [] if other.is_tie else [each for part in Judgement.of(other) or () for each in cls.of(part) or ()]
            case Judgement(prompt, (turn,), desirable) if not turn.get("tool_calls"):
                return [Stepwise(prompt, ({"role": "assistant", "content": turn["content"]},), (float(desirable),))]
        return [other] if type(other) is cls else None


def says_something(completion: Turns) -> bool:
    return any(turn.get("tool_calls") or str(turn["content"]).strip() for turn in completion)


# --- items: an example as token ids ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Completion:
    """What follows a prompt, and which of its tokens are scored."""

    ids: np.ndarray  # (tokens,) int32
    scored: np.ndarray  # (tokens,) bool


@dataclass(frozen=True, slots=True)
class Item:
    """An example as token ids."""

    prompt: np.ndarray  # (tokens,) int32, exactly what a sampler is fed
    completions: tuple[Completion, ...]  # as `Example.completed` has them: of a Comparison the first is the chosen one
    id: str  # where the row came from, and which of the row's examples it is
    labels: Mapping[str, float] = field(default_factory=dict)  # of the fields in `Example.labels`
    logps: np.ndarray | None = None  # (scored tokens,) float32, where a Scored came with its sampler's log-probs
    step_labels: np.ndarray | None = None  # (scored tokens,) float32 of a Stepwise, whose scored tokens end its steps
    teacher_logps: np.ndarray | None = None  # (scored tokens, 1 + 2 k) float32, of a Demonstration that has what a teacher says


PackRow = tuple[np.ndarray, Completion]  # a prompt's ids, and a completion


def row_hash(row: PackRow) -> bytes:
    """Hash all that a row's log-probs depend on besides the model: its tokens, and which of them are scored."""
    prompt, completion = row
    digest = hashlib.blake2b(np.array([len(prompt), len(completion.ids)], np.int64).tobytes(), digest_size=16)
    for ids in (prompt, completion.ids):
        digest.update(np.ascontiguousarray(ids, np.int64).tobytes())
    digest.update(np.ascontiguousarray(completion.scored, bool).tobytes())
    return digest.digest()
