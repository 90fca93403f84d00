"""How an architecture's log-probs or scores are computed, decided by trying on a small random model of it.

No flag says whether rows can be packed, and no name what stands between the last hidden states and the logits: whether one
row moves another does, and whether the numbers are the model's own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from halos.errors import UserError
from halos.logps import miniature
from halos.logps.attention import register
from halos.logps.head import Head
from halos.logps.hidden import PACKS, accepted, hidden_states
from halos.types import Sequences

LENGTHS = (9, 24, 14)  # of the trial's rows, each of which has a neighbour
LONG = 1  # the one that reaches over windows, between two others
MARGIN = 16.0  # times the rounding of the model's own forward: other kernels round otherwise
FLOOR = 1e-5  # of the largest logit: float32

Way = Literal["layer", "own", "whole"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How log-probs or scores are computed."""

    attention: str | None  # what the model is loaded with; None: transformers' own choice, a row at a time
    head: Way  # the output layer alone; the model's own code above its backbone; the model as a whole
    why: str | None = None  # rows are not packed

    @property
    def is_packed(self) -> bool:
        return self.attention in PACKS


def plan_for(config: PretrainedConfig, *, reward: bool, attention: str | None, longest: int | None = None) -> Plan:
    """The best way that is right. `attention` is what packed rows would use; with another, rows are taken one at a time.

    Raises UserError where none is right.
    """
    register()
    small = miniature.small_config(config, longest=longest)
    return _plan(_Asked(miniature.key_of(small), small), reward, attention if attention in PACKS else None)


_LOADED: WeakKeyDictionary[PreTrainedModel, Plan] = WeakKeyDictionary()


def remember(model: PreTrainedModel, plan: Plan) -> None:
    """The plan by which a model was loaded goes with it."""
    _LOADED[model] = plan


def plan_of(model: PreTrainedModel, *, reward: bool) -> Plan:
    """The plan by which a model was loaded; else one by its architecture, and by the attention that it has now."""
    if model not in _LOADED:
        _LOADED[model] = plan_for(model.config, reward=reward, attention=model.config._attn_implementation)
    return _LOADED[model]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A configuration, equal to those that compute in the same way."""

    key: str
    config: PretrainedConfig

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Asked) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


@cache
def _plan(asked: _Asked, reward: bool, attention: str | None) -> Plan:
    with _quiet():
        return _try(_Scores if reward else _Logits, asked.config, attention)


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers warns of a small random model is not of the run's."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.device("cpu"):  # whatever the device is on which the model itself is being made
            yield
    finally:
        transformers.logging.set_verbosity(before)


def _try(kind: type["_Logits"], config: PretrainedConfig, attention: str | None) -> Plan:
    trial = kind(config, seed=0)
    head = trial.way()
    if attention is None:
        return Plan(None, head)
    if head == "whole":
        return Plan(None, head, "it has no part that gives its last hidden states")
    why = trial.why_not_packed(attention, head)
    if why == trial.other_numbers:  # once more, before rounding that flipped a choice of experts counts against packing
        why = kind(config, seed=1).why_not_packed(attention, head)
    return Plan(attention, head) if why is None else Plan(None, head, why)


def sequences(rows: Sequence[Tensor]) -> Sequences:
    """Rows packed end to end; each but the first token of each is scored."""
    lengths = tuple(len(row) for row in rows)
    starts = [0, *accumulate(lengths)][:-1]
    positions = torch.cat([torch.arange(length) for length in lengths])
    sources = torch.cat([start + torch.arange(length - 1) for start, length in zip(starts, lengths, strict=True)])
    columns = torch.cat([torch.arange(length - 1) for length in lengths])
    number = torch.cat([torch.full((length - 1,), n) for n, length in enumerate(lengths)])
    ids = torch.cat(list(rows))
    return Sequences(ids, positions, lengths, ids[sources + 1], sources, number, columns, max(lengths) - 1)


class _Logits:
    """A language model on trial."""

    auto: Any = AutoModelForCausalLM
    other_numbers = "its logits would not be its own"

    def __init__(self, config: PretrainedConfig, *, seed: int) -> None:
        self.name = config.model_type
        self.rows = [miniature.row(length, len(LENGTHS) * seed + number) for number, length in enumerate(LENGTHS)]
        self.model = self._attempt(lambda: miniature.build(self.auto, config, seed=seed))
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
        """What the model itself says of a row, by transformers' plain path."""
        return whole(self.model, row).float()

    def _allowed(self) -> float:
        """How far right numbers may be from the model's own: by how far its own forward is from itself in float64."""
        try:
            if type(self.model)._can_set_experts_implementation():
                self.model.set_experts_implementation("eager")  # grouped products know no float64
            self.model.double()
            with torch.no_grad():
                noise = (whole(self.model, self.rows[LONG]) - self.truth).abs().max().item()
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
                f"{self.name} is not supported: what this model says of a token depends on the tokens after it, so it gives no"
                " log-prob of a completion (an encoder? is_decoder in its config.json)"
            )

    @torch.no_grad()
    def way(self) -> Way:
        row = self.rows[LONG]
        for head in ("layer", "own"):
            try:
                found = self._read(hidden_states(self.model, sequences([row])), [row], head)
            except Exception:  # no way for this one
                continue
            if self._is_near(found, self.truth):
                return head
        return "whole"

    def why_not_packed(self, attention: str, head: Way) -> str | None:
        truth = torch.cat([self._own(row) for row in self.rows])
        try:
            self.model.set_attn_implementation(attention)
            if self.model.config._attn_implementation != attention:
                return "it does not let its attention be chosen"
            if self._leaks():
                return "one row would read another"
            with torch.no_grad():
                found = self._read(hidden_states(self.model, sequences(self.rows)), self.rows, head)
            return None if self._is_near(found, truth) else self.other_numbers
        except Exception as error:  # what an architecture makes of packed rows
            return f"its code takes no packed rows ({_line(error)})"
        finally:
            self.model.set_attn_implementation(self.plain)

    def _leaks(self) -> bool:
        """Whether a row's hidden states have any gradient, however small, with respect to another's embeddings; or move beyond
        rounding where another's tokens change."""
        embedded: list[Tensor] = []
        hook = self.model.get_input_embeddings().register_forward_hook(lambda *given: embedded.append(given[2]))
        try:
            hidden = hidden_states(self.model, sequences(self.rows))
        finally:
            hook.remove()
        parts, weights = hidden.split(LENGTHS), torch.linspace(-1, 1, hidden.shape[-1])
        for number in reversed(range(len(parts))):  # most of what leaks flows from the rows before
            (gradient,) = torch.autograd.grad((parts[number] @ weights).sum(), embedded[0], retain_graph=True)
            own = gradient.reshape(-1, gradient.shape[-1]).split(LENGTHS)
            if any(bool(each.any()) for other, each in enumerate(own) if other != number) or not own[number].any():
                return True
        others = [row if number == LONG else row.flip(0) for number, row in enumerate(self.rows)]
        with torch.no_grad():
            moved = hidden_states(self.model, sequences(others)).split(LENGTHS)[LONG]
        return bool((moved - parts[LONG]).abs().max() > FLOOR * parts[LONG].abs().max())

    def _read(self, hidden: Tensor, rows: Sequence[Tensor], head: Way) -> Tensor:
        return Head.of(self.model, own=head == "own").logits(hidden)

    def _is_near(self, found: Tensor, truth: Tensor) -> bool:
        return (found - truth).abs().max().item() <= self.allowed


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Scores(_Logits):
    """A reward model on trial."""

    auto: Any = AutoModelForSequenceClassification
    other_numbers = "its scores would not be its own"

    def _refuse_looking_ahead(self) -> None:
        """A score is of a whole row."""

    def _read(self, hidden: Tensor, rows: Sequence[Tensor], head: Way) -> Tensor:
        if head == "own":
            raise NotImplementedError
        score: Any = self.model.score
        return score(hidden[torch.tensor(list(accumulate(len(row) for row in rows))) - 1]).float()


def whole(model: PreTrainedModel, row: Tensor, keep: Tensor | None = None) -> Tensor:
    """What the model itself says of one row: (tokens, vocabulary) logits, or (1, labels) scores; of the tokens `keep` alone."""
    some = {} if keep is None else accepted(type(model), logits_to_keep=keep)
    logits = model(input_ids=row[None], **some, **accepted(type(model), use_cache=False)).logits
    logits = logits if logits.dim() == 2 else logits[0]
    return logits if keep is None or len(logits) == len(keep) else logits[keep]  # some forwards take the word and do not heed it
