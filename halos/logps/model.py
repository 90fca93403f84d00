"""The modules that DDP and FSDP wrap: a language model with its head, or a reward model with its score."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from halos.logps.attention import SEGMENTS
from halos.logps.head import Head
from halos.types import Sequences, TokenLogps


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base model as it was before its adapter. Nothing but a flag of each layer moves: no gradient setting, no copy."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def bare(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself; its layers carry the adapter where there is one."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def hidden_states(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """The backbone over packed sequences: (tokens, hidden). Nothing attends across sequences."""
    backbone = getattr(model, model.base_model_prefix)
    if model.config._attn_implementation == SEGMENTS:
        extra: dict[str, object] = {"segments": batch.lengths}
    else:
        ends = torch.tensor([0, *accumulate(batch.lengths)], dtype=torch.int32, device=batch.ids.device)
        longest = max(batch.lengths)
        extra = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    output = backbone(input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False, **extra)
    return output.last_hidden_state[0]


class LanguageModel(nn.Module):
    """Sequences -> log-probs of their scored tokens. Prompt tokens never reach the head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Sequences) -> TokenLogps:
        model = bare(self.model)
        hidden = hidden_states(model, batch)[batch.sources]
        flat = Head.of(model).logps(hidden, batch.targets, model.config.get_text_config().vocab_size)
        rows = len(batch.lengths)
        values = flat.new_zeros(rows, batch.widest).index_put((batch.rows, batch.columns), flat)
        mask = torch.zeros(rows, batch.widest, dtype=torch.bool, device=flat.device)
        mask[batch.rows, batch.columns] = True
        return TokenLogps(values, mask)


class RewardModel(nn.Module):
    """Sequences -> one score each, read where AutoModelForSequenceClassification will read it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Sequences) -> Tensor:
        """(rows,) float32: the score at each sequence's last token that is not padding."""
        model: Any = bare(self.model)
        hidden = hidden_states(model, batch)[self._last(batch)]
        with torch.autocast(hidden.device.type, enabled=False):  # scores are compared: their differences are small
            return model.score(hidden.to(model.score.weight.dtype)).float().sum(1)  # of one label: FSDP wants no view

    def _last(self, batch: Sequences) -> Tensor:
        # where pad == eos, transformers takes the end token for padding and reads the token before it; so do we
        padding = bare(self.model).config.get_text_config().pad_token_id
        ends = torch.tensor(list(accumulate(batch.lengths)), device=batch.ids.device)
        index = torch.arange(len(batch.ids), device=batch.ids.device)
        index = torch.where(batch.ids == padding, -1, index) if padding is not None else index
        latest = index.cummax(0).values[ends - 1]
        return torch.maximum(latest, ends - torch.tensor(batch.lengths, device=batch.ids.device))
