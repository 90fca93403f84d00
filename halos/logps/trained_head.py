"""Log-probs through a head that is trained: chunks of rows, and one float32 gradient of its weight over all of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


@dataclass(frozen=True, slots=True)
class Softmax:
    """What a model does to the products of its last layer: scale, soft cap, temperature; and how many rows at once."""

    scale: float
    softcap: float | None
    temperature: float
    rows: int

    def logits(self, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """Divided by the temperature, float32; and the derivative of the soft cap, where there is one."""
        logits = products.float() * self.scale if self.scale != 1.0 else products.float()
        slope = None
        if self.softcap is not None:
            bent = torch.tanh(logits / self.softcap)
            logits, slope = self.softcap * bent, 1 - bent.square()
        return (logits if self.temperature == 1.0 else logits / self.temperature), slope


def is_covered(layer: nn.Module, hidden: Tensor) -> bool:
    """Whether a layer is no more than its own trained table: no adapter on it, no hook, nothing that computes its weight."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    weight = layer.weight
    return weight.requires_grad and type(weight) is nn.Parameter and hidden.dtype in (weight.dtype, _kind(weight))


def logps(layer: nn.Linear, hidden: Tensor, targets: Tensor, softmax: Softmax) -> Tensor:
    """log softmax(logits)[target]: hidden (rows, hidden), targets (rows,) -> (rows,) float32.

    Multiplied in the dtype that autocast asks for. Were each chunk's gradient of the weight added to the others' in half
    precision, its error would grow with their number.
    """
    return _LogProbs.apply(hidden.to(_kind(layer.weight)), layer.weight, layer.bias, targets, softmax)


def _kind(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _LogProbs(torch.autograd.Function):
    """Logits of a chunk are formed again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softmax: Softmax) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            table, start = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
            parts, norms = [], []
            for some, wanted in zip(hidden.split(softmax.rows), targets.split(softmax.rows), strict=True):
                logits, _ = softmax.logits(linear(some, table, start))
                norms.append(logits.logsumexp(-1))
                parts.append(logits.gather(-1, wanted[:, None])[:, 0] - norms[-1])
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(norms))
        ctx.softmax = softmax
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        softmax: Softmax = ctx.softmax
        table, start = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        of_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for first in range(0, len(hidden), softmax.rows):
            at = slice(first, first + softmax.rows)
            some, given = hidden[at], grad_outputs[0][at, None].float()
            logits, slope = softmax.logits(linear(some, table, start))
            off = (logits - norms[at, None]).exp_().mul_(-given)
            off.scatter_add_(-1, targets[at, None], given)
            off = off if slope is None else off.mul_(slope)
            off = off.mul_(softmax.scale / softmax.temperature).to(hidden.dtype)
            of_hidden[at] = off @ table
            _add_product(of_weight, off, some)
            if of_bias is not None:
                of_bias += off.sum(0, dtype=torch.float32)
        return of_hidden, of_weight.to(weight.dtype), None if of_bias is None else of_bias.to(bias.dtype), None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, which leaves the product in float32 wherever there are kernels that do."""
    if left.dtype is torch.float32:
        total.addmm_(left.T, right)
    elif left.is_cuda:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        total += left.T @ right
