"""Which experts a mixture's tokens went to, so that another forward pass can send them the same way.

Where two experts are nearly as likely, rounding decides which is taken, and what follows differs by more than rounding: no
error of a merge. So a merged model is compared along the routes of the trained one, and where it would have gone another
way is counted apart.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halos.distributed.parameters import shape_of

# by module with experts, in the order in which they are first called, all forward passes end to end: (tokens, k) experts, weights
Routes = Sequence[tuple[Tensor, Tensor]]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def recorded(model: nn.Module) -> Iterator[Routes]:
    """What the routers of `model` decide in here, before routes that are laid down inside; nothing for a model without any."""
    own: list[tuple[Tensor, Tensor]] = []

    def hook(number: int, index: Tensor, weights: Tensor) -> None:
        k = index.shape[-1]
        now = index.detach().reshape(-1, k).cpu(), weights.detach().reshape(-1, k).float().cpu()
        if number == len(own):
            own.append(now)
        else:
            own[number] = torch.cat([own[number][0], now[0]]), torch.cat([own[number][1], now[1]])

    with _before_experts(model, hook):
        yield own


@contextmanager
def replayed(model: nn.Module, routes: Routes) -> Iterator[None]:
    """Forward passes in here take `routes`, in the order in which those were recorded.

    The weights are the model's own where it would have chosen the same experts.
    """
    read = dict[int, int]()  # tokens so far

    def hook(number: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        k = index.shape[-1]
        start = read.get(number, 0)
        end = read[number] = start + index.numel() // k
        if number >= len(routes) or len(routes[number][0]) < end or routes[number][0].shape[-1] != k:
            return None
        wanted, theirs = (each[start:end].reshape(index.shape).to(index.device) for each in routes[number])
        return _laid_down(index, weights, wanted, theirs)

    with _before_experts(model, hook):
        yield


def _laid_down(index: Tensor, weights: Tensor, wanted: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The `wanted` experts with the model's own weights for them where it chose the same, else with `theirs`."""
    chosen, order = index.sort(-1)
    places = wanted.argsort(-1).argsort(-1)  # where in its sorted row each wanted expert stands
    same = (chosen == wanted.sort(-1).values).all(-1, keepdim=True)
    mine = weights.gather(-1, order).gather(-1, places)
    return wanted.to(index.dtype), torch.where(same, mine, theirs.to(weights.dtype))


@contextmanager
def _before_experts(model: nn.Module, hook: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor] | None]) -> Iterator[None]:
    """Call `hook` with the number of a module with experts and what its tokens are to take: it may give something else."""
    numbers: dict[nn.Module, int] = {}  # a module that stands beside its trained copy is never called

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if (at := _where((args, kwargs))) is None:
            return None
        number = numbers.setdefault(module, len(numbers))
        taken = hook(number, *(_get((args, kwargs), each) for each in at))
        return _set(_set((args, kwargs), at[0], taken[0]), at[1], taken[1]) if taken else None

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in _experts(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _experts(model: nn.Module) -> list[nn.Module]:
    """Modules that hold their experts in parameters of three dimensions, which ZeRO-3 keeps flat."""
    return [module for module in model.modules()
            if any(len(shape_of(each)) == 3 for each in module.parameters(recurse=False))]  # fmt: skip


def decisions(routes: Routes) -> int:
    """How many there are: one for each token and layer."""
    return sum(len(index) for index, _ in routes)


def otherwise(one: Routes, other: Routes) -> float:
    """The share of the decisions that are not the same on both: other experts, or none at all."""
    count, same = max(decisions(one), decisions(other)), 0
    for (index, _), (wanted, _) in zip(one, other, strict=False):
        if index.shape == wanted.shape:
            same += int((index.sort(-1).values == wanted.sort(-1).values).all(-1).sum())
    return 1 - same / count if count else 0.0


# --- the arguments of a module with experts --------------------------------------------------------------------------

At = int | str  # of an argument, by its number or its name


def _where(given: Arguments) -> tuple[At, At] | None:
    """The chosen experts (whole numbers) and their weights, of one shape, among the arguments of a module with experts."""
    args, kwargs = given
    tensors = {at: value for at, value in [*enumerate(args), *kwargs.items()] if isinstance(value, Tensor)}
    for index, chosen in tensors.items():
        if chosen.dtype in (torch.int64, torch.int32):
            for at, value in tensors.items():
                if value.is_floating_point() and value.shape == chosen.shape:
                    return index, at
    return None


def _get(given: Arguments, at: At) -> Tensor:
    args, kwargs = given
    return args[at] if isinstance(at, int) else kwargs[at]


def _set(given: Arguments, at: At, value: Tensor) -> Arguments:
    args, kwargs = given
    if isinstance(at, int):
        return (*args[:at], value, *args[at + 1 :]), kwargs
    return args, {**kwargs, at: value}
