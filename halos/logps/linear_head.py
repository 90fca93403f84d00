"""Log-probs and statistics through a plain linear head, in chunks of rows: products in the working dtype with a float32 result.

Of a trained head one float32 weight gradient is accumulated over all chunks. Of a frozen one the gradient of a log-prob with
respect to the hidden state, W[target] - softmax W, depends on no loss, and is formed while the logits exist.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeGuard

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from halos.logps.distribution import Reading
from halos.logps.working_weights import cast

HALVES = (torch.bfloat16, torch.float16)
COLUMNS = 4096  # tokens of a product on a CPU, some rows of which stay in its cache
IN_CACHE = 2**20  # elements of float32 that do, 4 MiB


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

    def slopes(self, products: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probs of targets (rows, 1), and their negative derivatives by `products`, which may be overwritten."""
        logits, slope = self.logits(products)
        norms = logits.logsumexp(-1, keepdim=True)
        values = logits.gather(-1, targets) - norms
        grad = logits.sub_(norms).exp_().scatter_add_(-1, targets, -torch.ones_like(norms))
        grad = grad if slope is None else grad.mul_(slope)
        factor = self.scale / self.temperature
        return values[:, 0], grad if factor == 1.0 else grad.mul_(factor)


def computing(layer: nn.Module | None) -> nn.Module | None:
    """The layer that computes: of one that is trained whole beside an adapter its copy, or the base's where adapters are off."""
    if not isinstance(layer, ModulesToSaveWrapper):
        return layer
    names = layer.active_adapters
    is_own = layer.disable_adapters or not names or any(name not in layer.modules_to_save for name in names)
    return layer.original_module if is_own else layer.modules_to_save[names[0]]


def is_plain(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a layer is nothing but its weight and bias: an nn.Linear with no adapter, no hook, and parameters of its own."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    return type(layer.weight) is nn.Parameter and layer.weight.dtype.is_floating_point


def is_covered(layer: nn.Linear, hidden: Tensor) -> bool:
    """Whether log-probs through a plain layer are computed here: where gradients are wanted, or the products are in half
    precision."""
    dtype = compute_dtype(layer.weight)
    return hidden.dtype in (layer.weight.dtype, dtype) and (dtype in HALVES or torch.is_grad_enabled())


def is_trained(layer: nn.Linear) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def read(layer: nn.Linear, hidden: Tensor, reading: Reading, softmax: Softmax, *, recompute: bool = False) -> Tensor:
    """The log-probs and statistics of a `Reading`: hidden (rows, hidden) -> (rows, width) float32.

    The products run in autocast's dtype. The weight gradient is accumulated in float32, since in half precision its error would
    grow with the number of chunks. `recompute`: a frozen layer's logits are computed again in the backward pass, as they are
    for more than log-probs: the product of each statistic's gradient with the weight would cost as much as the logits.
    """
    hidden = hidden.to(compute_dtype(layer.weight))
    frozen = not is_trained(layer) and hidden.requires_grad and torch.is_grad_enabled()
    if frozen and reading.is_logp_alone and not recompute:
        return _FrozenLogProbs.apply(hidden, layer.weight, layer.bias, reading.targets, softmax)[:, None]
    return _Read.apply(hidden, layer.weight, layer.bias, reading, softmax)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of products with a weight: autocast's, where it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def products(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden (rows, hidden) times the transposed weight (vocabulary, hidden), plus bias: (rows, vocabulary), float32 for halves.

    Both have one dtype. A half's product is exact in float32; sums rounded to a half would move log-probs by hundredths.
    """
    if hidden.dtype not in HALVES:
        return linear(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda:
            result = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        else:
            result = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
            for part, own in zip(weight.split(COLUMNS), result.split(COLUMNS, -1), strict=True):
                _write_product(own, hidden, part.T)
        return result if bias is None else result.add_(bias)


def _write_product(result: Tensor, left: Tensor, right: Tensor) -> None:
    """Write the product of halves into a float32 matrix on a CPU, which has no such product: in bfloat16 as two terms, of which
    the second is what the rounding of the first has lost; both take half the time of a product in float32."""
    if left.dtype is torch.bfloat16 and has_two_terms():
        rounded = left @ right
        result.copy_(rounded)
        result.add_(rounded.addmm_(left, right, beta=-1))
    else:
        result.copy_(left.float() @ right.float())


@cache
def has_two_terms() -> bool:
    """Whether this CPU's bfloat16 products subtract a matrix before they round, so that the difference has 8 bits of its own."""
    left, right = (torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16() for size in ((48, 320), (320, 512)))
    rounded = left @ right
    terms = rounded.double() + torch.addmm(rounded, left, right, beta=-1).double()
    exact = left.double() @ right.double()
    return bool((terms - exact).norm() < 2**-16 * exact.norm())


class _Read(torch.autograd.Function):
    """A chunk's logits are recomputed in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, reading: Reading, softmax: Softmax) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            half_weight, half_bias = cast(weight, hidden.dtype).detach(), None if bias is None else bias.to(hidden.dtype)
            parts = []
            for chunk, some in zip(hidden.split(softmax.rows), reading.split(softmax.rows), strict=True):
                logits, _ = softmax.logits(products(chunk, half_weight, half_bias))
                parts.append(some.values(logits))
        values, norms = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, norms, values)
        ctx.reading, ctx.softmax = reading, softmax
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        hidden, weight, bias, norms, values = ctx.saved_tensors
        softmax: Softmax = ctx.softmax
        half_weight, half_bias = cast(weight, hidden.dtype).detach(), None if bias is None else bias.to(hidden.dtype)
        grad_hidden, (_, trains_weight, trains_bias, *_) = torch.empty_like(hidden), ctx.needs_input_grad
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if trains_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if trains_bias else None
        for number, some in enumerate(ctx.reading.split(softmax.rows)):
            rows = slice(number * softmax.rows, (number + 1) * softmax.rows)
            chunk = hidden[rows]
            logits, slope = softmax.logits(products(chunk, half_weight, half_bias))
            grad_logits = some.gradient(logits, norms[rows], values[rows], grad_outputs[0][rows].float())
            grad_logits = grad_logits if slope is None else grad_logits.mul_(slope)
            grad_logits = grad_logits.mul_(softmax.scale / softmax.temperature).to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ half_weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, chunk)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
        grads = [None if grad is None else grad.to(each.dtype) for grad, each in ((grad_weight, weight), (grad_bias, bias))]
        return grad_hidden, *grads, None, None


class _FrozenLogProbs(torch.autograd.Function):
    """Two products a row, against three where the logits are computed again; (rows, hidden) is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softmax: Softmax) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            half_weight, half_bias = cast(weight, hidden.dtype).detach(), None if bias is None else bias.to(hidden.dtype)
            parts, slopes_of_logp = [], torch.empty_like(hidden)
            for first in range(0, len(hidden), softmax.rows):
                rows = slice(first, first + softmax.rows)
                made = products(hidden[rows], half_weight, half_bias)
                grad_logits = made if hidden.dtype is torch.float32 else torch.empty_like(made, dtype=hidden.dtype)
                for some in _in_cache(made):
                    values, grad = softmax.slopes(made[some], targets[rows][some, None])
                    parts.append(values)
                    if grad_logits is not made or grad.data_ptr() != made[some].data_ptr():
                        grad_logits[some] = grad
                slopes_of_logp[rows] = (grad_logits @ half_weight).neg_()
        ctx.save_for_backward(slopes_of_logp)
        return torch.cat([hidden.new_zeros(0, dtype=torch.float32), *parts])  # of no rows, there are none

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (slopes_of_logp,) = ctx.saved_tensors
        return (slopes_of_logp * grad_outputs[0][:, None]).to(slopes_of_logp.dtype), None, None, None, None


def _in_cache(logits: Tensor) -> list[slice]:
    """Some rows after others, as many as stay in a CPU's cache; on other devices all at once. Blocks are as equal as possible: a
    single row may be summed in another order."""
    blocks = -(-logits.numel() // IN_CACHE) if logits.device.type == "cpu" else 1
    size = -(-len(logits) // max(1, blocks))
    return [slice(start, start + size) for start in range(0, len(logits), max(1, size))]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, with the product in float32 where such a kernel exists."""
    if left.dtype is torch.float32:
        total.addmm_(left.T, right)
    elif left.is_cuda:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        total += left.T @ right
