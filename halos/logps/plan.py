"""Decides how an architecture's log-probs or scores are computed, by trying it on a small random model of the architecture.

Neither flags nor names of the architecture decide whether sequences can be packed, or what lies between the last hidden states
and the logits, but two tests: one sequence must not influence another, and the numbers must equal the model's own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from halos.errors import UserError
from halos.logps import miniature
from halos.logps.attention import TREES, register
from halos.logps.auto import CLASSES
from halos.logps.head import Head, classifier_of
from halos.logps.hidden import PACKS, hidden_states, whole_model
from halos.reward_kind import RewardKind
from halos.types import Sequences

LENGTHS = (9, 24, 14)  # of the trial's sequences, each of which has a neighbour
LONG = 1  # index of the sequence that exceeds the windows, between two others
TRUNK = 11  # of its tokens, when the trial shares them
MARGIN = 16.0  # times the rounding error of the model's own forward: other kernels round differently
FLOOR = 1e-5  # of the largest logit: float32

Way = Literal["layer", "own", "whole"]


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """How log-probs or scores are computed."""

    attention: str | None  # attn_implementation of the model; None: transformers' default, one sequence at a time
    head: Way  # layer: the output layer alone; own: the model's own code above its backbone; whole: the model as a whole
    why: str | None = None  # sequences are not packed
    shares: bool = False  # sequences that have a prompt in common are packed as a tree, which holds it once

    @property
    def is_packed(self) -> bool:
        return self.attention in PACKS


def plan_for(
    config: PretrainedConfig, *, reward: RewardKind | None, attention: str | None, longest: int | None = None
) -> ForwardPlan:
    """The fastest correct plan. `attention` is the one for packed sequences; with any other, sequences go one at a time.

    Raises UserError where no plan is correct.
    """
    register()
    small = miniature.small_config(config, longest=longest)
    return _plan(_CacheKey(miniature.key_of(small), small), reward, attention if attention in PACKS else None)


_LOADED: WeakKeyDictionary[PreTrainedModel, ForwardPlan] = WeakKeyDictionary()


def remember(model: PreTrainedModel, plan: ForwardPlan) -> None:
    """Record the plan with which a model was loaded."""
    _LOADED[model] = plan


def plan_of(model: PreTrainedModel, *, reward: RewardKind | None) -> ForwardPlan:
    """The plan with which a model was loaded; else one for its architecture and its current attention."""
    if model not in _LOADED:
        _LOADED[model] = plan_for(model.config, reward=reward, attention=model.config._attn_implementation)
    return _LOADED[model]


@dataclass(frozen=True, slots=True)
class _CacheKey:
    """A configuration that compares equal to those with the same arithmetic."""

    key: str
    config: PretrainedConfig

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CacheKey) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


@cache
def _plan(key: _CacheKey, reward: RewardKind | None, attention: str | None) -> ForwardPlan:
    with _quiet():
        return _choose(_TRIALS[reward], key.config, attention)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers, whose warnings about a small random model do not concern the run."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.device("cpu"):  # whatever device the run's own model is being built on
            yield
    finally:
        transformers.logging.set_verbosity(before)


def _choose(kind: type["_LanguageTrial"], config: PretrainedConfig, attention: str | None) -> ForwardPlan:
    trial = kind(config, seed=0)
    head = trial.way()
    if attention is None:
        return ForwardPlan(None, head)
    if head == "whole":
        return ForwardPlan(None, head, "it has no part that gives its last hidden states")
    why = trial.why_not_packed(attention, head)
    if why == trial.other_numbers:  # once more: rounding may have changed which experts a router chose
        why = kind(config, seed=1).why_not_packed(attention, head)
    if why is not None:
        return ForwardPlan(None, head, why)
    return ForwardPlan(attention, head, shares=attention in TREES and trial.is_tree_right(attention, head))


class _LanguageTrial:
    """A small random language model, on which plans are tried."""

    reward: RewardKind | None = None
    other_numbers = "its logits would not be its own"

    def __init__(self, config: PretrainedConfig, *, seed: int) -> None:
        self.name = config.model_type
        self.rows = [miniature.row(length, len(LENGTHS) * seed + number) for number, length in enumerate(LENGTHS)]
        self.model = self._attempt(lambda: miniature.build(CLASSES[self.reward], config, seed=seed))
        self.plain = self.model.config._attn_implementation
        self.truth = self._attempt(lambda: self._own(self.rows[LONG]))
        if not self.truth.isfinite().all():
            raise UserError(f"{self.name} is not supported: a small random model of it gives numbers that are not finite")
        self.allowed = self._allowed()
        self._refuse_looking_ahead()

    def _attempt(self, of: Callable[[], Any]) -> Any:
        try:
            return of()
        except Exception as error:  # whatever an architecture raises
            raise UserError(f"{self.name} is not supported: transformers' own code for it fails: {_line(error)}") from error

    @torch.no_grad()
    def _own(self, row: Tensor) -> Tensor:
        """The unmodified transformers forward of one sequence."""
        return whole_model(self.model, row).float()

    def _allowed(self) -> float:
        """The tolerance: a multiple of the distance between the model's own forward and itself in float64."""
        try:
            if type(self.model)._can_set_experts_implementation():
                self.model.set_experts_implementation("eager")  # grouped matmuls have no float64 kernels
            self.model.double()
            with torch.no_grad():
                noise = (whole_model(self.model, self.rows[LONG]) - self.truth).abs().max().item()
        except Exception:  # some architectures cannot compute in float64
            noise = 0.0
        finally:
            self.model.float()
            if type(self.model)._can_set_experts_implementation():
                self.model.set_experts_implementation(self.model.get_correct_experts_implementation(None))
        return max(MARGIN * noise, FLOOR * self.truth.abs().max().item())

    def _refuse_looking_ahead(self) -> None:
        row = self.rows[LONG].clone()
        half = len(row) // 2
        row[half:] = self.rows[LONG].flip(0)[half:]
        if not (self._own(row)[:half] - self.truth[:half]).abs().max().item() <= self.allowed:
            raise UserError(
                f"{self.name} is not supported: what this model predicts for a token depends on the tokens after it, so it has no"
                " log-prob of a completion (is it an encoder? see is_decoder in its config.json)"
            )

    @torch.no_grad()
    def way(self) -> Way:
        """The cheapest way from hidden states to the model's own numbers."""
        row = self.rows[LONG]
        for head in ("layer", "own"):
            try:
                output = self._read(hidden_states(self.model, miniature.sequences([row])), [row], head)
            except Exception:  # this way does not work for this architecture
                continue
            if self._is_near(output, self.truth):
                return head
        return "whole"

    def why_not_packed(self, attention: str, head: Way) -> str | None:
        """The reason why sequences of this architecture cannot be packed; None where they can."""
        truth = torch.cat([self._own(row) for row in self.rows])
        try:
            self.model.set_attn_implementation(attention)
            if self.model.config._attn_implementation != attention:
                return "it does not let its attention be chosen"
            if self._leaks(miniature.sequences(self.rows), LENGTHS, kept=(LONG,)):
                return "one row would read another"
            with torch.no_grad():
                output = self._read(hidden_states(self.model, miniature.sequences(self.rows)), self.rows, head)
            return None if self._is_near(output, truth) else self.other_numbers
        except Exception as error:  # whatever an architecture raises on packed sequences
            return f"its code takes no packed rows ({_line(error)})"
        finally:
            self.model.set_attn_implementation(self.plain)

    def is_tree_right(self, attention: str, head: Way) -> bool:
        """Whether sequences that share their first tokens give their own numbers when these are computed once."""
        whole = self.rows[LONG]
        trunk, branches = whole[:TRUNK], [whole[TRUNK:], whole.flip(0)[:TRUNK]]
        rows = [torch.cat([trunk, each]) for each in branches]
        truth, lengths = torch.cat([self._own(row) for row in rows]), [TRUNK, *map(len, branches)]
        try:
            self.model.set_attn_implementation(attention)
            if self._leaks(miniature.tree(trunk, branches), lengths, kept=(0, 2)):
                return False
            with torch.no_grad():
                parts = hidden_states(self.model, miniature.tree(trunk, branches)).split(lengths)
                hidden = torch.cat([torch.cat([parts[0], part]) for part in parts[1:]])
                return self._is_near(self._read(hidden, rows, head), truth)
        except Exception:  # whatever an architecture raises on them
            return False
        finally:
            self.model.set_attn_implementation(self.plain)

    def _leaks(self, batch: Sequences, lengths: Sequence[int], *, kept: tuple[int, ...]) -> bool:
        """Whether a part, of `lengths` tokens, has any gradient with respect to a part that it may not read, or the last of the
        `kept` ones changes by more than rounding with the tokens of others. Parts are sequences, or a trunk and its branches."""
        embedded: list[Tensor] = []
        hook = self.model.get_input_embeddings().register_forward_hook(lambda *given: embedded.append(given[2]))
        try:
            hidden = hidden_states(self.model, batch)
        finally:
            hook.remove()
        parts, weights = hidden.split(lengths), torch.linspace(-1, 1, hidden.shape[-1])
        for number in reversed(range(len(parts))):  # most leaks come from earlier parts
            (gradient,) = torch.autograd.grad((parts[number] @ weights).sum(), embedded[0], retain_graph=True)
            own, read = gradient.reshape(-1, gradient.shape[-1]).split(lengths), {number, *kept[:-1]}
            if any(bool(each.any()) for other, each in enumerate(own) if other not in read) or not own[number].any():
                return True
        ids = [part if number in kept else part.flip(0) for number, part in enumerate(batch.ids.split(lengths))]
        with torch.no_grad():
            moved = hidden_states(self.model, replace(batch, ids=torch.cat(ids))).split(lengths)[kept[-1]]
        before = parts[kept[-1]]
        return bool((moved - before).abs().max() > FLOOR * before.abs().max())

    def _read(self, hidden: Tensor, rows: Sequence[Tensor], head: Way) -> Tensor:
        return Head.of(self.model, own=head == "own").logits(hidden)

    def _is_near(self, output: Tensor, truth: Tensor) -> bool:
        return (output - truth).abs().max().item() <= self.allowed


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _OutcomeTrial(_LanguageTrial):
    """A small random reward model, on which plans are tried."""

    reward: RewardKind | None = RewardKind.OUTCOME
    other_numbers = "its scores would not be its own"

    def _refuse_looking_ahead(self) -> None:
        """Nothing to refuse: a score may depend on every token."""

    def _read(self, hidden: Tensor, rows: Sequence[Tensor], head: Way) -> Tensor:
        if head == "own":
            raise NotImplementedError
        return classifier_of(self.model)(self._scored(hidden, rows)).float()

    def _scored(self, hidden: Tensor, rows: Sequence[Tensor]) -> Tensor:
        return hidden[torch.tensor(list(accumulate(len(row) for row in rows))) - 1]


class _ProcessTrial(_OutcomeTrial):
    """A small random process reward model, any token of which may end a step."""

    reward = RewardKind.PROCESS

    def _scored(self, hidden: Tensor, rows: Sequence[Tensor]) -> Tensor:
        return hidden


_TRIALS: dict[RewardKind | None, type[_LanguageTrial]] = {
    each.reward: each for each in (_LanguageTrial, _OutcomeTrial, _ProcessTrial)
}
