"""Record the experts that a mixture's tokens are routed to, and replay these routes in another forward pass.

Where two experts are almost equally likely, rounding decides which one is taken, and the outputs differ by more than rounding:
that is no error of a merge. So a merged model is compared along the routes of the trained one, and the decisions that it would
have made differently are counted separately.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halos.distributed.parameters import shape_of

# for each module with experts, in the order of their first calls, all forward passes concatenated: (tokens, k) experts, weights
Routes = Sequence[tuple[Tensor, Tensor]]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def recorded(model: nn.Module) -> Iterator[Routes]:
    """Record what the routers of `model` decide, before `replayed` changes it; empty for a model without routers."""
    own: list[tuple[Tensor, Tensor]] = []

    def hook(number: int, index: Tensor, weights: Tensor) -> None:
        k = index.shape[-1]
        taken = index.detach().reshape(-1, k).cpu(), weights.detach().reshape(-1, k).float().cpu()
        if number == len(own):
            own.append(taken)
        else:
            own[number] = torch.cat([own[number][0], taken[0]]), torch.cat([own[number][1], taken[1]])

    with _before_experts(model, hook):
        yield own


@contextmanager
def replayed(model: nn.Module, routes: Routes) -> Iterator[None]:
    """Make forward passes take `routes`, in the order in which they were recorded.

    The weights are the model's own where it would have chosen the same experts.
    """
    read = dict[int, int]()  # tokens so far

    def hook(number: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        k = index.shape[-1]
        start = read.get(number, 0)
        end = read[number] = start + index.numel() // k
        if number >= len(routes) or len(routes[number][0]) < end or routes[number][0].shape[-1] != k:
            return None
        recorded_index, recorded_weights = (each[start:end].reshape(index.shape).to(index.device) for each in routes[number])
        return _forced(index, weights, recorded_index, recorded_weights)

    with _before_experts(model, hook):
        yield


def _forced(index: Tensor, weights: Tensor, recorded_index: Tensor, recorded_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the recorded experts, with the model's own weights where it chose the same ones, else with the recorded weights."""
    chosen, order = index.sort(-1)
    ranks = recorded_index.argsort(-1).argsort(-1)  # the index of each recorded expert in its sorted row
    same = (chosen == recorded_index.sort(-1).values).all(-1, keepdim=True)
    own = weights.gather(-1, order).gather(-1, ranks)
    return recorded_index.to(index.dtype), torch.where(same, own, recorded_weights.to(weights.dtype))


@contextmanager
def _before_experts(model: nn.Module, hook: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor] | None]) -> Iterator[None]:
    """Call `hook` with the number of a module with experts, and its tokens' experts and weights; it may return others."""
    numbers: dict[nn.Module, int] = {}  # by first call: the original of a module with a trained copy is never called

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if (keys := _routing_arguments((args, kwargs))) is None:
            return None
        number = numbers.setdefault(module, len(numbers))
        changed = hook(number, *(_get((args, kwargs), key) for key in keys))
        return _set(_set((args, kwargs), keys[0], changed[0]), keys[1], changed[1]) if changed else None

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in _experts(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _experts(model: nn.Module) -> list[nn.Module]:
    """Return the modules with stacked experts: three-dimensional parameters, by their shape before ZeRO-3 flattens them."""
    return [module for module in model.modules()
            if any(len(shape_of(each)) == 3 for each in module.parameters(recurse=False))]  # fmt: skip


def decisions(routes: Routes) -> int:
    """Return the number of decisions: one for each token and layer."""
    return sum(len(index) for index, _ in routes)


def rerouted_fraction(one: Routes, other: Routes) -> float:
    """Return the fraction of decisions that differ: other experts, or none at all."""
    count, same = max(decisions(one), decisions(other)), 0
    for (index, _), (other_index, _) in zip(one, other, strict=False):
        if index.shape == other_index.shape:
            same += int((index.sort(-1).values == other_index.sort(-1).values).all(-1).sum())
    return 1 - same / count if count else 0.0


# --- the arguments of a module with experts --------------------------------------------------------------------------

Key = int | str  # an argument's position or its name


def _routing_arguments(arguments: Arguments) -> tuple[Key, Key] | None:
    """Find the chosen experts (integers) and their weights, of the same shape, among the arguments of a module with experts."""
    args, kwargs = arguments
    tensors = {key: value for key, value in [*enumerate(args), *kwargs.items()] if isinstance(value, Tensor)}
    for index, chosen in tensors.items():
        if chosen.dtype in (torch.int64, torch.int32):
            for key, value in tensors.items():
                if value.is_floating_point() and value.shape == chosen.shape:
                    return index, key
    return None


def _get(arguments: Arguments, key: Key) -> Tensor:
    args, kwargs = arguments
    return args[key] if isinstance(key, int) else kwargs[key]


def _set(arguments: Arguments, key: Key, value: Tensor) -> Arguments:
    args, kwargs = arguments
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: value}
