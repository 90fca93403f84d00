"""The modules that DDP and FSDP wrap: a language model with its head, or a reward model with its score."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from halos.errors import UserError
from halos.logps.head import Head, chosen
from halos.logps.hidden import hidden_states, is_packed, most_rows
from halos.logps.plan import plan_of, whole
from halos.logps.start import WHOLE, at_start, beginning_of, start_of
from halos.types import Acted, Sequences, TokenLogps, Whole


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base model as it was before its adapter, its own trained biases included.

    Nothing but a flag of each layer moves, and those biases: no gradient setting, no copy of a model.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    readers = [module for module in model.modules() if isinstance(module, Reader) and module.start]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        with ExitStack() as stack:
            for reader in readers:
                _stand_at(stack, model, reader, reader.start)
            yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


@contextmanager
def at_beginning(model: nn.Module) -> Iterator[None]:
    """The policy as its run began: the base, or where the run began with a trained adapter the base under that one."""
    readers = [module for module in model.modules() if isinstance(module, Reader) and module.beginning]
    with ExitStack() as stack:
        if not readers:
            stack.enter_context(adapter_off(model))
        for reader in readers:
            _stand_at(stack, model, reader, reader.beginning)
        yield


def _stand_at(stack: ExitStack, model: nn.Module, reader: "Reader", values: dict[str, Tensor]) -> None:
    stack.callback(reader.layout.reshard, model)
    stack.enter_context(at_start(reader, values, reader.layout))
    reader.layout.reshard(model)


def bare(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself; its layers carry the adapter where there is one."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def in_rows(flat: Tensor, batch: Sequences) -> Tensor:
    """What was computed for each scored token, as (rows, time); 0 where a row has ended."""
    return flat.new_zeros(len(batch.lengths), batch.widest).index_put((batch.rows, batch.columns), flat)


def mask_of(batch: Sequences) -> Tensor:
    """Which places of (rows, time) are scored tokens: bool."""
    mask = torch.zeros(len(batch.lengths), batch.widest, dtype=torch.bool, device=batch.ids.device)
    true = torch.ones((), dtype=torch.bool, device=mask.device)  # there already: a GPU would wait for one from the host
    return mask.index_put_((batch.rows, batch.columns), true)


def sources_of_rows(batch: Sequences) -> list[Tensor]:
    """Where in each sequence the tokens stand that predict its scored ones."""
    starts = torch.tensor([0, *accumulate(batch.lengths)], device=batch.ids.device)
    within, counts = batch.sources - starts[batch.rows], torch.bincount(batch.rows, minlength=len(batch.lengths))
    return list(within.split(counts.tolist()))


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Inside, transformers' own choice of attention, which whole rows and `generate` go through. For hooks that sample:
    `with plainly(run.model): run.model.generate(...)`."""
    inner = bare(model)
    before = str(inner.config._attn_implementation)
    inner.set_attn_implementation(inner.get_correct_attn_implementation(None) if is_packed(inner) else before)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


class Reader(nn.Module):
    """A transformers model under what reads it, by the plan that is right for its architecture."""

    reward = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, inner = model, bare(model)
        self.plan = plan_of(inner, reward=self.reward)
        if is_packed(inner) and not self.plan.is_packed:
            inner.set_attn_implementation(inner.get_correct_attn_implementation(None))
        self.start = {f"model.{name}": value for name, value in start_of(model).items()}
        self.beginning = {f"model.{name}": value for name, value in beginning_of(model).items()}
        self.layout = WHOLE  # the strategy's, where a run holds the model

    def forward(self, batch: Sequences | Whole) -> Any:
        """What `read` says; of a whole row, what the model itself does."""
        return whole(bare(self.model), batch.ids) if isinstance(batch, Whole) else self.read(batch)

    def read(self, batch: Sequences) -> Any:
        raise NotImplementedError

    def plainly(self) -> AbstractContextManager[None]:
        return plainly(self.model)

    def hidden(self, batch: Sequences) -> Tensor:
        return hidden_states(bare(self.model), batch, everywhere=self.layout.is_sharded)

    def whole(self, batch: Sequences, keep: Sequence[Tensor] | None) -> Tensor:
        """What the model says when it is called as a whole, one row after the other, of the places `keep` in each."""
        inner, rows = bare(self.model), batch.ids.split(batch.lengths)
        more = most_rows(batch) - len(rows) if self.layout.is_sharded else 0
        said = torch.cat([whole(inner, row, None if keep is None else keep[n]).float() for n, row in enumerate(rows)])
        for _ in range(more):
            said = said + 0.0 * whole(inner, rows[0]).float().sum()
        return said


class _Policy(Reader):
    """A language model under what looks at its hidden states."""

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        super().__init__(model)
        self.temperature = temperature

    def logps(self, hidden: Tensor, batch: Sequences) -> TokenLogps:
        """From the hidden states (scored, hidden) that predict the scored tokens."""
        model = bare(self.model)
        head = Head.of(model, self.temperature, own=self.plan.head == "own")
        flat = head.logps(hidden, batch.targets, model.config.get_text_config().vocab_size)
        return TokenLogps(in_rows(flat, batch), mask_of(batch))


class LanguageModel(_Policy):
    """Sequences -> log-probs of their scored tokens. Prompt tokens never reach the head."""

    def read(self, batch: Sequences) -> TokenLogps:
        if self.plan.head != "whole":
            return self.logps(self.hidden(batch)[batch.sources], batch)
        logits = self.whole(batch, sources_of_rows(batch))
        return TokenLogps(in_rows(chosen(logits, batch.targets, self.temperature), batch), mask_of(batch))


class ActorCritic(_Policy):
    """A language model and a linear value head on its last hidden states, which starts at 0: no second model is held."""

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        super().__init__(model, temperature=temperature)
        if self.plan.head == "whole":
            raise UserError(
                f"{type(bare(model)).__name__} has no part that gives its last hidden states, which a value head reads"
            )
        config = bare(model).config.get_text_config()
        self.value_head = nn.Linear(config.hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def read(self, batch: Sequences) -> Acted:
        hidden = self.hidden(batch)[batch.sources]
        logps = self.logps(hidden, batch)
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden.float()).sum(-1)  # of one output: FSDP wants no view
        return Acted(logps, in_rows(values, batch))


class RewardModel(Reader):
    """Sequences -> one score each, read where AutoModelForSequenceClassification will read it."""

    reward = True

    def read(self, batch: Sequences) -> Tensor:
        """(rows,) float32: the score at each sequence's last token that is not padding."""
        return self.scores(batch).sum(1)  # of one label: FSDP wants no view

    def scores(self, batch: Sequences) -> Tensor:
        """(rows, labels) float32."""
        if self.plan.head == "whole":
            return self.whole(batch, None)
        model: Any = bare(self.model)
        hidden = self.hidden(batch)[last_tokens(batch, model.config.get_text_config().pad_token_id)]
        return scores_of(model, hidden)


def scores_of(model: Any, hidden: Tensor) -> Tensor:
    """A sequence classifier's scores of hidden states (rows, hidden): (rows, labels) float32, whatever the weights are in.

    Scores are compared, and their differences are small.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        head = model.score
        if head.weight.dtype is torch.float32 or not isinstance(head, nn.Linear):
            return head(hidden.to(head.weight.dtype)).float()
        return nn.functional.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())


def last_tokens(batch: Sequences, padding: int | None) -> Tensor:
    """Where each sequence's last token stands that is not padding: (rows,) int64.

    Where pad == eos, transformers takes the end token for padding and reads the token before it; so do we.
    """
    ends = torch.tensor(list(accumulate(batch.lengths)), device=batch.ids.device)
    index = torch.arange(len(batch.ids), device=batch.ids.device)
    index = torch.where(batch.ids == padding, -1, index) if padding is not None else index
    latest = index.cummax(0).values[ends - 1]
    return torch.maximum(latest, ends - torch.tensor(batch.lengths, device=batch.ids.device))
