"""Log-probs through a trained head: computed in chunks of rows, with one float32 weight gradient accumulated over all chunks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


@dataclass(frozen=True, slots=True)
class Softmax:
    """The map from a head's matmul to logits: scale, soft cap, temperature; and the number of rows in a chunk."""

    scale: float
    softcap: float | None
    temperature: float
    rows: int  # of a chunk

    def logits(self, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """float32 logits divided by the temperature, and the derivative of the soft cap where there is one."""
        logits = products.float() * self.scale if self.scale != 1.0 else products.float()
        slope = None
        if self.softcap is not None:
            capped = torch.tanh(logits / self.softcap)
            logits, slope = self.softcap * capped, 1 - capped.square()
        return (logits if self.temperature == 1.0 else logits / self.temperature), slope


def is_covered(layer: nn.Module, hidden: Tensor) -> bool:
    """Whether a layer is a plain trained nn.Linear: no adapter, no hook, and a weight that is its own parameter."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    weight = layer.weight
    return weight.requires_grad and type(weight) is nn.Parameter and hidden.dtype in (weight.dtype, _compute_dtype(weight))


def logps(layer: nn.Linear, hidden: Tensor, targets: Tensor, softmax: Softmax) -> Tensor:
    """log softmax(logits)[target]: hidden (rows, hidden), targets (rows,) -> (rows,) float32.

    The matmul runs in autocast's dtype. The weight gradient is accumulated in float32, since in half precision its error would
    grow with the number of chunks.
    """
    return _LogProbs.apply(hidden.to(_compute_dtype(layer.weight)), layer.weight, layer.bias, targets, softmax)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _LogProbs(torch.autograd.Function):
    """A chunk's logits are recomputed in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softmax: Softmax) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            half_weight, half_bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
            parts, norms = [], []
            for chunk, chunk_targets in zip(hidden.split(softmax.rows), targets.split(softmax.rows), strict=True):
                logits, _ = softmax.logits(linear(chunk, half_weight, half_bias))
                norms.append(logits.logsumexp(-1))
                parts.append(logits.gather(-1, chunk_targets[:, None])[:, 0] - norms[-1])
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(norms))
        ctx.softmax = softmax
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        softmax: Softmax = ctx.softmax
        half_weight, half_bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for first in range(0, len(hidden), softmax.rows):
            rows = slice(first, first + softmax.rows)
            chunk, grad_logps = hidden[rows], grad_outputs[0][rows, None].float()
            logits, slope = softmax.logits(linear(chunk, half_weight, half_bias))
            grad_logits = (logits - norms[rows, None]).exp_().mul_(-grad_logps)
            grad_logits.scatter_add_(-1, targets[rows, None], grad_logps)
            grad_logits = grad_logits if slope is None else grad_logits.mul_(slope)
            grad_logits = grad_logits.mul_(softmax.scale / softmax.temperature).to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ half_weight
            _add_product(grad_weight, grad_logits, chunk)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
        return grad_hidden, grad_weight.to(weight.dtype), None if grad_bias is None else grad_bias.to(bias.dtype), None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, with the product in float32 where such a kernel exists."""
    if left.dtype is torch.float32:
        total.addmm_(left.T, right)
    elif left.is_cuda:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        total += left.T @ right
