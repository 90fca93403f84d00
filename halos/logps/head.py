"""From hidden states to log-probs and statistics of tokens: float32, chunked over rows, never a full logits tensor."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from halos.logps import linear_head
from halos.logps.distribution import Reading, read
from halos.logps.hidden import accepted, name_of_backbone

LOGITS_AT_ONCE = 2**25  # elements of float32, 128 MiB: large enough for a CPU's matmuls, small next to the activations
OF_MEMORY = 64  # a GPU's chunk of logits takes at most this part of its memory: 1 GiB of 80


class _BackboneOutput(tuple[Tensor, ...]):
    """A backbone's output with hidden states alone, readable as a tuple or by name; every other attribute is None."""

    __slots__ = ()

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, _: str) -> None:
        return None


class _PrecomputedBackbone(nn.Module):
    """Replaces a backbone and returns hidden states that it has already computed."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> _BackboneOutput:
        return _BackboneOutput((self.hidden,))


def own_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(rows, hidden) -> (rows, vocabulary): the model's own forward, applied to hidden states of its backbone."""
    name = name_of_backbone(model)
    assert name is not None
    backbone = model._modules[name]
    model._modules[name] = _PrecomputedBackbone(hidden[None])
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return model.forward(input_ids=ids, **accepted(type(model), use_cache=False)).logits[0]
    finally:
        model._modules[name] = backbone


@dataclass(frozen=True, slots=True)
class Head:
    """Maps a language model's last hidden states to logits: by its output layer, scale and soft cap, or, where the architecture
    does more than that (`layer` is None), by its own forward."""

    model: PreTrainedModel
    layer: nn.Module | None  # called as a module, so that its bias or adapter counts; None: the model's own forward
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0  # of the softmax
    recomputes: bool = False  # a frozen layer's logits in the backward pass, as earlier versions did

    @classmethod
    def of(cls, model: PreTrainedModel, temperature: float = 1.0, *, own: bool = False, recomputes: bool = False) -> "Head":
        if own:
            return cls(model, None, temperature=temperature)
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        layer = linear_head.computing(model.get_output_embeddings())
        assert isinstance(layer, nn.Module), f"{type(model).__name__} has no LM head"
        return cls(model, layer, scale, getattr(config, "final_logit_softcapping", None), temperature, recomputes)

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocabulary), float32, equal to the model's own."""
        if self.layer is None:
            return own_logits(self.model, hidden).float()
        logits = self.layer(hidden).float()
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _is_linear(self, layer: nn.Linear, hidden: Tensor) -> bool:
        """Whether log-probs are those of `linear_head`; earlier versions had them for frozen layers in half precision alone."""
        halves = linear_head.compute_dtype(layer.weight) in linear_head.HALVES
        earlier = self.recomputes and not (halves or layer.weight.requires_grad)
        return linear_head.is_covered(layer, hidden) and not earlier

    def _chunk(self, hidden: Tensor, reading: Reading) -> Tensor:
        return from_logits(self.logits(hidden), reading, self.temperature)

    def read(self, hidden: Tensor, reading: Reading, vocabulary: int) -> Tensor:
        """Log-probs and statistics of softmax(logits / temperature): hidden (rows, hidden) -> (rows, width) float32.

        No chunk's logits are kept: those of a frozen layer are not needed again, others are recomputed in the backward pass.
        """
        rows = max(1, (LOGITS_AT_ONCE if self.recomputes else logits_at_once(hidden.device)) // vocabulary)
        layer = self.layer
        if linear_head.is_plain(layer) and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(layer.weight.dtype)  # a norm that is trained too returns the base's
        if linear_head.is_plain(layer) and self._is_linear(layer, hidden):
            softmax = linear_head.Softmax(self.scale, self.softcap, self.temperature, rows)
            return linear_head.read(layer, hidden, reading, softmax, recompute=self.recomputes)
        parts = []
        for chunk, some in zip(hidden.split(rows), reading.split(rows), strict=True):
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._chunk, chunk, some, use_reentrant=False))  # of an adapter the same dropout again
            else:
                parts.append(self._chunk(chunk, some))
        return torch.cat(parts)


def classifier_of(model: Any) -> Any:
    """Return the layer of a reward model that reads its hidden states."""
    return model.score if hasattr(model, "score") else model.classifier


def scores_of(model: Any, hidden: Tensor) -> Tensor:
    """A classifier's scores of hidden states (rows, hidden): (rows, labels), computed in float32 whatever the dtype of the
    weights, since scores are compared and their differences are small."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = classifier_of(model)
        if head.weight.dtype is torch.float32 or not isinstance(head, nn.Linear):
            return head(hidden.to(head.weight.dtype)).float()
        return nn.functional.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())


def logits_at_once(device: torch.device) -> int:
    """The number of logits in a chunk: a power of 2 that depends on the device alone, so that a run on its like repeats it."""
    if device.type != "cuda":
        return LOGITS_AT_ONCE
    elements = torch.cuda.get_device_properties(device).total_memory // OF_MEMORY // 4
    return max(LOGITS_AT_ONCE, 2 ** (elements.bit_length() - 1))


def from_logits(logits: Tensor, reading: Reading, temperature: float) -> Tensor:
    """Log-probs and statistics of softmax(logits / temperature): (rows, vocabulary) float32 -> (rows, width)."""
    logits = logits if temperature == 1.0 else logits / temperature
    if reading.is_logp_alone:  # by autograd, as in runs that earlier versions began: `read` rounds otherwise
        return (logits.gather(-1, reading.targets[:, None])[:, 0] - logits.logsumexp(-1))[:, None]
    return read(logits, reading)
