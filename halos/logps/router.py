"""The balancing loss of a mixture of experts, exact over a global batch: eq. 4 to 6 of arXiv:2101.03961.

L = E sum_e f_e P_e. Over all tokens of the batch and all layers at once, f_e is the frequency with which expert e is among the
top k (no gradient) and P_e its mean probability. Given f, L is a sum over tokens, so the gradients of micro-batches and ranks
add up to that of the global batch. Every token that the policy reads counts, prompts included.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from halos.errors import UserError
from halos.logps.hidden import backbone_of, is_padding_call
from halos.logps.model import bare
from halos.types import Mean


def refuse_without_router(config: PretrainedConfig, weight: float | None) -> None:
    """Raises UserError where a weight is set but transformers has no balancing loss for this model."""
    if weight and not has_balancing_loss(config):
        raise UserError(
            f"train.router_aux_loss={weight:g}: transformers has no balancing loss for {config.model_type}"
            " (it has no router, or one balanced by a bias): leave it out"
        )


def weight_in(config: PretrainedConfig) -> float:
    """The weight of the loss in the model's own forward: its coefficient, where the config asks for router logits."""
    if not (getattr(config.get_text_config(), "output_router_logits", False) and has_balancing_loss(config)):
        return 0.0
    return float(_setting(config, "router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight") or 0.0)  # the others: JetMoE, DBRX


def has_balancing_loss(config: PretrainedConfig) -> bool:
    """Whether transformers has a balancing loss for this model. DeepSeek-V3, for example, is balanced by a bias instead."""
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    return kind is not None and hasattr(sys.modules[kind.__module__], "load_balancing_loss_func")


def _setting(config: PretrainedConfig, *names: str) -> Any:
    """Return the first of the names that the config of the text model has, or its part on experts, as DBRX has one."""
    text = config.get_text_config()
    parts = (text, getattr(text, "ffn_config", None))
    return next((value for part in parts for name in names if (value := getattr(part, name, None)) is not None), None)


class RouterLoss:
    """Records a policy's router logits in its latest forward pass, and computes that pass's part of the balancing loss."""

    def __init__(self, model: nn.Module, weight: float) -> None:
        inner = bare(model)
        self.weight, self._top_k = weight, int(_setting(inner.config, "num_experts_per_tok", "moe_top_k"))
        self._is_recording = False
        self._logits: list[Tensor] = []  # one per layer: (tokens, experts)
        backbone = backbone_of(inner)
        assert backbone is not None, "transformers' balancing loss reads the output of a backbone"
        backbone.register_forward_pre_hook(self._request_logits, with_kwargs=True)
        backbone.register_forward_hook(self._record_logits)

    @classmethod
    def of(cls, model: nn.Module, weight: float | None) -> "RouterLoss | None":
        """The loss with `weight`, or with the weight in the model's config; None where that is 0."""
        config = bare(model).config
        refuse_without_router(config, weight)
        weight = weight_in(config) if weight is None else weight
        return cls(model, weight) if weight else None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward pass inside, and forget the one before."""
        self._is_recording, self._logits = True, []
        try:
            yield
        finally:
            self._is_recording = False

    def counts(self) -> Tensor:
        """How often each expert was chosen, then the number of tokens: (experts + 1,) float64. Counts of passes add up."""
        chosen = torch.cat([logits.detach().float().softmax(-1).topk(self._top_k, -1).indices for logits in self._logits])
        frequencies = chosen.new_zeros(self._logits[0].shape[-1] + 1)  # bincount would wait for the largest of `chosen`
        frequencies.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        frequencies[-1] = len(chosen)
        return frequencies.double()

    def part(self, counts: Tensor) -> Mean:
        """This pass's part of L, given the summed `counts` of all passes of the batch: totals sum to L, counts to 1."""
        frequencies, tokens = counts[:-1].float(), counts[-1].float()
        own_tokens = sum(len(logits) for logits in self._logits)
        probabilities = torch.stack([logits.float().softmax(-1).sum(0) for logits in self._logits]).sum(0)
        return Mean(len(frequencies) * (probabilities @ (frequencies / tokens)) / tokens, own_tokens / tokens)

    def _request_logits(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, {**kwargs, "output_router_logits": True}) if self._is_recording else None

    def _record_logits(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._is_recording and not is_padding_call():
            self._logits += output.router_logits
