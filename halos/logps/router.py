"""The balancing loss of a mixture of experts, exact over a global batch: eq. 4 to 6 of arXiv:2101.03961.

L = E sum_e f_e P_e. Over all tokens of the batch and all layers at once, f_e is how often expert e is among the top k (no
gradient) and P_e its mean probability. Where f is known, L is a sum over tokens, so micro-batches and processes add up to
the gradient of the whole. Every token that the policy reads counts, prompts included.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from halos.errors import UserError
from halos.logps.hidden import backbone_of, counts
from halos.logps.model import bare
from halos.types import Mean


def refuse_without_router(config: PretrainedConfig, weight: float | None) -> None:
    """Raises UserError where a weight was given for a loss that transformers does not know for this model."""
    if weight and not has_balancing_loss(config):
        raise UserError(
            f"train.router_aux_loss={weight:g}: transformers knows no balancing loss for {config.model_type}"
            " (it has no router, or one that a bias balances): leave it out"
        )


def weight_in(config: PretrainedConfig) -> float:
    """What the model's own forward would weigh the loss with: its coefficient, where it is asked for router logits."""
    text = config.get_text_config()
    if not (getattr(text, "output_router_logits", False) and has_balancing_loss(config)):
        return 0.0
    return float(getattr(text, "router_aux_loss_coef", None) or getattr(text, "aux_loss_coef", None) or 0.0)  # JetMoE's name


def has_balancing_loss(config: PretrainedConfig) -> bool:
    """Whether transformers knows a balancing loss for this model. DeepSeek-V3, say, is balanced by a bias instead."""
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    return kind is not None and hasattr(sys.modules[kind.__module__], "load_balancing_loss_func")


class RouterLoss:
    """Watches the routers of a policy, and turns what they said in its latest forward pass into its share of the loss."""

    def __init__(self, model: nn.Module, weight: float) -> None:
        inner = bare(model)
        self.weight, self._top_k = weight, int(inner.config.get_text_config().num_experts_per_tok)
        self._watching = False
        self._logits: list[Tensor] = []  # a layer each: (tokens, experts)
        backbone = backbone_of(inner)
        assert backbone is not None, "transformers' balancing loss is read off the output of one"
        backbone.register_forward_pre_hook(self._ask, with_kwargs=True)
        backbone.register_forward_hook(self._keep)

    @classmethod
    def of(cls, model: nn.Module, weight: float | None) -> "RouterLoss | None":
        """The loss with `weight`, or with what the model's config says; None where that is nothing."""
        config = bare(model).config
        refuse_without_router(config, weight)
        weight = weight_in(config) if weight is None else weight
        return cls(model, weight) if weight else None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The forward pass in here is the one that counts, and no longer one before it."""
        self._watching, self._logits = True, []
        try:
            yield
        finally:
            self._watching = False

    def counts(self) -> Tensor:
        """How often each expert was chosen, and after them how many tokens chose: (experts + 1,) float64. They add up."""
        chosen = torch.cat([logits.detach().float().softmax(-1).topk(self._top_k, -1).indices for logits in self._logits])
        often = torch.bincount(chosen.flatten(), minlength=self._logits[0].shape[-1])
        return torch.cat([often, often.new_tensor([len(chosen)])]).double()

    def share(self, counts: Tensor) -> Mean:
        """This pass's part of L, where `counts` are those of all passes of the batch: the totals sum to L, the counts to 1."""
        often, tokens = counts[:-1].float(), counts[-1].float()
        seen = sum(len(logits) for logits in self._logits)
        likely = torch.stack([logits.float().softmax(-1).sum(0) for logits in self._logits]).sum(0)
        return Mean(len(often) * (likely @ (often / tokens)) / tokens, seen / tokens)

    def _ask(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, {**kwargs, "output_router_logits": True}) if self._watching else None

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._watching and counts():
            self._logits += output.router_logits
