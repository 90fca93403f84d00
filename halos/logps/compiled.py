"""torch.compile of what surrounds attention in a model's layers: norms, and feed-forward networks.

These regions rather than whole layers: the lengths of sequences and trees differ at every step, and stay out of what is compiled.
So the number of tokens is its only dynamic size, and every layer runs the code of the first. No region sums over tokens but in
matrix products, so that its code does not depend on how many there are, in this process or in one that resumes the run.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from halos.errors import UserError, first_line_of

VARIANTS = 64  # of a class: with and without gradients, adapter and training, each for the sizes of several norms
HINT = 4096  # tokens that code is generated for, whatever the first batch has: a resumed run computes with the same code
OPTIONS: dict[str, Any] = {
    "emulate_precision_casts": True,  # round in bfloat16 where the model's code does: policy and reference have other graphs
    "deterministic": True,  # choose kernels by rule and not by their time, which another process would measure otherwise
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_eager = 0


@contextmanager
def eager() -> Iterator[None]:
    """Inside, regions compute as transformers wrote them: for a forward that a run's own is compared with, and for sampling."""
    global _eager
    _eager += 1
    try:
        yield
    finally:
        _eager -= 1


def compile_regions(model: nn.Module, like: nn.Module | None = None) -> None:
    """Let the regions of a model be compiled when they are first called on packed sequences. `like`: only those whose classes are
    compiled in that model, so that a frozen reference is rounded as the policy is."""
    kinds = None if like is None else {type(part) for part in like.modules() if hasattr(part, "is_compiled")}
    for region in regions_of(model):
        if not hasattr(region, "is_compiled") and (kinds is None or _compiled(type(region)) in kinds):
            region.__class__ = _compiled(type(region))


def regions_of(model: nn.Module) -> list[nn.Module]:
    """Return what `compile_regions` compiles: the outermost modules within layers that compute one tensor from one, and are more
    than a linear layer and less than experts to choose from. Not those with a trained vector, whose gradient is a sum over
    tokens."""
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    return [region for layer in layers for region in _regions_in(layer)]


def _regions_in(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _is_region(child):
            yield child
        elif not isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield from _regions_in(child)


def _is_region(module: nn.Module) -> bool:
    arguments, sizes = inspect.signature(module.forward).parameters.values(), [each.ndim for each in module.parameters()]
    is_leaf = not any(True for _ in module.children())
    return (
        [each.kind for each in arguments] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]
        and bool(sizes)
        and max(sizes) <= (1 if is_leaf else 2)
        and not any(each.requires_grad and each.ndim == 1 for each in module.parameters())
        and not type(module).__module__.startswith("torch.")  # its norms are one kernel each, and containers only contain
        and not isinstance(module, BaseTunerLayer)
        and not any(isinstance(part, nn.ModuleList) for part in module.modules())  # experts, chosen by the values
    )


@cache
def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """A class as `kind`, with its forward compiled. Raises UserError where it cannot be."""
    from torch._dynamo import config, mark_dynamic  # a second of imports, which other runs are spared
    from torch._dynamo.exc import TorchDynamoException

    config.optimize_ddp = False  # it would cut each region at DDP's buckets, which are larger, and not the reference's
    settings: Any = {"options": OPTIONS, "recompile_limit": VARIANTS}  # dynamo's own limit is of one thread
    fast: Any = torch.compile(kind.forward, **settings)

    def forward(self: nn.Module, hidden: Tensor) -> Any:
        if _eager or not _is_packed(hidden) or _has_hooks(self):
            return kind.forward(self, hidden)
        mark_dynamic(hidden, 1, hint_override=HINT)
        try:
            return fast(self, hidden)
        except TorchDynamoException as error:
            raise UserError(
                f"train.compile=true: torch.compile of {kind.__name__} failed: {first_line_of(error)}. Leave it out, or see"
                " that torch finds a C++ compiler (CXX), and on a GPU Triton"
            ) from error

    return type(kind.__name__, (kind,), {"forward": forward, "is_compiled": True, "__module__": kind.__module__})


def _is_packed(hidden: Tensor) -> bool:
    """Whether these are the values of one row of several tokens: (1, tokens, ...)."""
    return hidden.dim() >= 3 and hidden.shape[0] == 1 and hidden.shape[1] > 1


def _has_hooks(region: nn.Module) -> bool:
    """Whether a module within has a hook, which compiled code would not call."""
    return any(getattr(part, hooks) for part in region.modules() if part is not region for hooks in HOOKS)
