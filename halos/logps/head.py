"""From hidden states to log-probs of given tokens: float32, chunked over rows, never a full logits tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

LOGITS_AT_ONCE = 2**25  # 128 MiB of float32: large enough for efficient products, small beside the activations


@dataclass(frozen=True, slots=True)
class Head:
    """A language model's last layer, and what the model does to logits after it."""

    layer: nn.Module  # called as a module, so that a bias or an adapter on it counts
    scale: float
    softcap: float | None
    temperature: float = 1.0  # of the softmax

    @classmethod
    def of(cls, model: PreTrainedModel, temperature: float = 1.0) -> "Head":
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        layer = model.get_output_embeddings()
        assert isinstance(layer, nn.Module), f"{type(model).__name__} has no LM head"
        return cls(layer, scale, getattr(config, "final_logit_softcapping", None), temperature)

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocabulary), float32, as the model itself would have them."""
        logits = self.layer(hidden).float()
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(hidden)
        logits = logits if self.temperature == 1.0 else logits / self.temperature
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    def logps(self, hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
        """log softmax(logits / temperature)[target]: hidden (rows, hidden), targets (rows,) -> (rows,) float32.

        Logits of a chunk are formed again in the backward pass instead of being kept.
        """
        rows = max(1, LOGITS_AT_ONCE // vocabulary)
        parts = []
        for some_hidden, some_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._chunk, some_hidden, some_targets, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._chunk(some_hidden, some_targets))
        return torch.cat(parts)
