"""Linear layers with a LoRA adapter, W x + (alpha/r) B A x, in as few passes over memory as their products need.

PEFT computes B A x, that times alpha/r, and the sum, each a tensor of the size of the output, and as many again in the backward
pass. Here the products add to what is there. That is the same mathematics, rounded otherwise.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from halos.logps.working_weights import cast


class _AdaptedLinear(torch.autograd.Function):
    """x (..., in), a frozen weight (out, in) and bias (out,) or None, all of one dtype; trained A (r, in) and B (out, r), which
    are cast to it; and alpha/r: (..., out). Each call's gradients of A and B are in their own dtype, in which they are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        output, low = linear(x, weight, bias), linear(x, cast(a, x.dtype).detach())
        output.view(-1, output.shape[-1]).addmm_(low.view(-1, low.shape[-1]), cast(b, x.dtype).detach().t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, weight, own_a, own_b, low = ctx.saved_tensors
        a, b = cast(own_a, x.dtype).detach(), cast(own_b, x.dtype).detach()
        grad = grad_outputs[0].reshape(-1, weight.shape[0])
        for_x, _, _, for_a, for_b, _ = ctx.needs_input_grad
        grad_low = torch.addmm(low.view(-1, low.shape[-1]), grad, b, beta=0, alpha=ctx.scale)  # with beta=0 the first is not read
        grad_x = (grad @ weight).addmm_(grad_low, a).view(x.shape) if for_x else None
        grad_a = (grad_low.t() @ x.reshape(-1, x.shape[-1])).to(own_a.dtype) if for_a else None
        grad_b = torch.addmm(b, grad.t(), low.view(-1, low.shape[-1]), beta=0, alpha=ctx.scale).to(own_b.dtype) if for_b else None
        return grad_x, None, None, grad_a, grad_b, None


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return x W^T + bias + (alpha/r) x A^T B^T, (..., out), with gradients of x, A and B alone; `scale` is alpha/r."""
    output = _AdaptedLinear.apply(x, weight, bias, a, b, scale)
    assert isinstance(output, Tensor)
    return output


class LoraLinear(Linear):
    """PEFT's layer, which computes so where only a frozen linear layer and one plain adapter take part, and else as PEFT does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(active) != 1 or not self._is_plain(active[0]):
            return super().forward(x, *args, **kwargs)
        base, a, b = (_weight(layer) for layer in (self.base_layer, self.lora_A[active[0]], self.lora_B[active[0]]))
        bias, autocast, device = getattr(self.base_layer, "bias", None), torch.is_autocast_enabled(x.device.type), x.device.type
        if (torch.get_autocast_dtype(device) if autocast else x.dtype) != base.dtype or (a.dtype != base.dtype and not autocast):
            return super().forward(x)
        kind = base.dtype
        return adapted_linear(x.to(kind), base, bias, a, b, self.scaling[active[0]])

    def _is_plain(self, adapter: str) -> bool:
        """Return whether these are torch's linear layers: whole, not quantised, and with weights that are always there."""
        layers, dropout = (self.base_layer, self.lora_A[adapter], self.lora_B[adapter]), self.lora_dropout[adapter]
        return (
            adapter not in self.lora_variant
            and all(type(layer) is nn.Linear and not _has_hooks(layer) for layer in layers)
            and all(type(each) in (nn.Parameter, Tensor) for layer in layers for each in layer.parameters())
            and not any(each.requires_grad for each in layers[0].parameters())
            and all(getattr(layer, "bias", None) is None for layer in layers[1:])
            and (not dropout.training or not getattr(dropout, "p", 0.0))
        )


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return layer.weight


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def fuse(model: nn.Module) -> None:
    """Let PEFT's layers within a model compute so."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = LoraLinear
