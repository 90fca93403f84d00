"""The modules that DDP and FSDP wrap: a language model with its head, or a reward model with its score."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from halos.errors import UserError
from halos.logps.compiled import eager
from halos.logps.distribution import Reading
from halos.logps.head import Head, from_logits, scores_of
from halos.logps.hidden import hidden_states, is_packed, max_rows_over_ranks, whole_model
from halos.logps.plan import plan_of
from halos.logps.reference_values import UNSHARDED, base_values_of, reference_values_of
from halos.reward_kind import RewardKind
from halos.transfer import to_device
from halos.types import Acted, Sequences, TokenLogps, WholeModelInput


def bare(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself; its layers include the adapter where there is one."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def in_rows(flat: Tensor, batch: Sequences) -> Tensor:
    """Values of the scored tokens, (scored, ...), as a padded (rows, time, ...); 0 beyond the end of a row."""
    return flat.new_zeros(len(batch.leaves), batch.widest, *flat.shape[1:]).index_put((batch.rows, batch.columns), flat)


def mask_of(batch: Sequences) -> Tensor:
    """True where (rows, time) holds a scored token."""
    mask = torch.zeros(len(batch.leaves), batch.widest, dtype=torch.bool, device=batch.ids.device)
    true = torch.ones((), dtype=torch.bool, device=mask.device)  # made on the device: copying one from the host would synchronise
    return mask.index_put_((batch.rows, batch.columns), true)


def sources_of_rows(batch: Sequences) -> list[Tensor]:
    """For each sequence the indices of the tokens that predict its scored tokens."""
    starts = to_device(torch.tensor([0, *accumulate(batch.lengths)]), batch.ids.device)
    within, counts = batch.sources - starts[batch.rows], torch.bincount(batch.rows, minlength=len(batch.lengths))
    return list(within.split(counts.tolist()))


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as transformers wrote it, with its default attention, as `generate` and unpacked sequences need.
    For hooks that sample: `with plainly(run.model): run.model.generate(...)`."""
    inner = bare(model)
    before = str(inner.config._attn_implementation)
    inner.set_attn_implementation(inner.get_correct_attn_implementation(None) if is_packed(inner) else before)
    try:
        with eager():
            yield
    finally:
        inner.set_attn_implementation(before)


class ModelWithHead(nn.Module):
    """A transformers model with the head that reads it, computed by the plan that is right for its architecture."""

    reward: RewardKind | None = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, inner = model, bare(model)
        self.plan = plan_of(inner, reward=self.reward)
        if is_packed(inner) and not self.plan.is_packed:
            inner.set_attn_implementation(inner.get_correct_attn_implementation(None))
        self.base_values = {f"model.{name}": value for name, value in base_values_of(model).items()}
        self.reference_values = {f"model.{name}": value for name, value in reference_values_of(model).items()}
        self.layout = UNSHARDED  # in a run, that of its strategy

    def forward(self, batch: Sequences | WholeModelInput) -> Any:
        """`read` of packed sequences; for a `WholeModelInput`, the unmodified transformers forward."""
        return whole_model(bare(self.model), batch.ids) if isinstance(batch, WholeModelInput) else self.read(batch)

    def read(self, batch: Sequences) -> Any:
        """The output of model and head over packed sequences."""
        raise NotImplementedError

    def plainly(self) -> AbstractContextManager[None]:
        return plainly(self.model)

    def hidden(self, batch: Sequences) -> Tensor:
        return hidden_states(bare(self.model), batch, equal_calls=self.layout.is_sharded)

    def whole_model(self, batch: Sequences, keep: Sequence[Tensor] | None) -> Tensor:
        """The model's own output, one sequence at a time, at the token indices `keep` of each."""
        inner, rows = bare(self.model), batch.ids.split(batch.lengths)
        padding_calls = max_rows_over_ranks(batch) - len(rows) if self.layout.is_sharded else 0
        output = torch.cat([whole_model(inner, row, None if keep is None else keep[n]).float() for n, row in enumerate(rows)])
        for _ in range(padding_calls):
            output = output + 0.0 * whole_model(inner, rows[0]).float().sum()
        return output


def share_prompts(*modules: nn.Module | None) -> bool:
    """Whether all of these models give right numbers where a prompt is computed once for several sequences."""
    parts = (part for module in modules if module is not None for part in module.modules())
    return all(part.plan.shares for part in parts if isinstance(part, ModelWithHead))


class _Policy(ModelWithHead):
    """A language model, and the temperature of its log-probs."""

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        super().__init__(model)
        self.temperature = temperature
        self.recomputes_head = False  # in a run that an earlier version began
        self.token_statistics: tuple[str, ...] = ()  # of a loss
        self.top, self.below = 0, 0  # of a teacher: how many likeliest ids it says, and below which id

    def logps(self, hidden: Tensor, batch: Sequences) -> TokenLogps:
        """From the hidden states (scored, hidden) that predict the scored tokens."""
        model = bare(self.model)
        head = Head.of(model, self.temperature, own=self.plan.head == "own", recomputes=self.recomputes_head)
        reading = self.reading(batch)
        table = head.read(hidden, reading, model.config.get_text_config().vocab_size)
        return reading.token_logps(in_rows(table, batch), mask_of(batch))

    def reading(self, batch: Sequences) -> Reading:
        if self.top:
            return Reading(batch.targets, top=self.top, below=self.below)
        return Reading.of(batch.targets, self.token_statistics, batch.candidates)


class LanguageModel(_Policy):
    """Sequences -> log-probs of their scored tokens: by the head, or where the plan says so from the whole model's logits."""

    def read(self, batch: Sequences) -> TokenLogps:
        if self.plan.head != "whole":
            return self.logps(self.hidden(batch)[batch.sources], batch)
        reading = self.reading(batch)
        table = from_logits(self.whole_model(batch, sources_of_rows(batch)), reading, self.temperature)
        return reading.token_logps(in_rows(table, batch), mask_of(batch))


class ActorCritic(_Policy):
    """A language model with a linear value head on its last hidden states, initialised to 0; no separate critic is held."""

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        super().__init__(model, temperature=temperature)
        if self.plan.head == "whole":
            raise UserError(
                f"{type(bare(model)).__name__} has no submodule that returns its last hidden states, which a value head reads"
            )
        config = bare(model).config.get_text_config()
        self.value_head = nn.Linear(config.hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def read(self, batch: Sequences) -> Acted:
        hidden = self.hidden(batch)[batch.sources]
        logps = self.logps(hidden, batch)
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden.float()).sum(-1)  # sum over the one output, since FSDP takes no view
        return Acted(logps, in_rows(values, batch))


class RewardModel(ModelWithHead):
    """Sequences -> one score each, at the token where AutoModelForSequenceClassification reads it."""

    reward = RewardKind.OUTCOME

    def read(self, batch: Sequences) -> Tensor:
        """(rows,) float32: the score at each sequence's last token that is not padding."""
        return self.scores(batch).sum(1)  # sum over the one label, since FSDP takes no view

    def scores(self, batch: Sequences) -> Tensor:
        """(rows, labels) float32."""
        if self.plan.head == "whole":
            return self.whole_model(batch, None)
        model: Any = bare(self.model)
        hidden = self.hidden(batch)[last_tokens(batch, model.config.get_text_config().pad_token_id)]
        return scores_of(model, hidden)


class ProcessRewardModel(ModelWithHead):
    """Sequences -> two logits at each scored token, the last one of a step, as AutoModelForTokenClassification has them."""

    reward = RewardKind.PROCESS

    def read(self, batch: Sequences) -> Tensor:
        """(rows, time, labels) float32; only the hidden states at ends of steps go through dropout and head."""
        if self.plan.head == "whole":
            return in_rows(self.whole_model(batch, None)[own_tokens(batch)], batch)
        model: Any = bare(self.model)
        hidden = self.hidden(batch)[own_tokens(batch)]
        return in_rows(scores_of(model, model.dropout(hidden) if hasattr(model, "dropout") else hidden), batch)


def own_tokens(batch: Sequences) -> Tensor:
    """The indices of the scored tokens themselves: (scored,) int64. Where a branch begins, the token before lies in its trunk."""
    begins = to_device(torch.tensor([own for _, _, own, _ in _bounds(batch)]), batch.ids.device)
    return torch.maximum(batch.sources + 1, begins[batch.rows])


def last_tokens(batch: Sequences, padding: int | None) -> Tensor:
    """The index of each sequence's last token that is not padding: (rows,) int64.

    Where pad == eos, transformers takes the end token for padding and reads the token before it; so does this.
    """
    device, index = batch.ids.device, torch.arange(len(batch.ids), device=batch.ids.device)
    first, trunk, own, end = to_device(torch.tensor(_bounds(batch)), device).T
    latest = (torch.where(batch.ids == padding, -1, index) if padding is not None else index).cummax(0).values
    of_own, of_trunk = latest[end - 1], torch.maximum(latest[trunk - 1], first)
    return torch.where(of_own >= own, of_own, of_trunk)


def _bounds(batch: Sequences) -> list[tuple[int, int, int, int]]:
    """For each row where its tree begins, where the trunk ends, and where the row's own tokens begin and end."""
    bounds, first = list[tuple[int, int, int, int]](), 0
    for trunk, *branches in batch.trees:
        own = first + trunk
        bounds += [] if branches else [(first, own, first, own)]
        for branch in branches:
            bounds.append((first, first + trunk, own, own + branch))
            own += branch
        first = own
    return [each for _, each in sorted(zip(batch.leaves, bounds, strict=True))]
