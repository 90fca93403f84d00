"""What is trained of a model with an adapter, as it was at the start, so that the model can compute what it did then.

Of most adapters that is the base's own part of it, biases: with the adapter off they are the base's again. A run that begins
with a trained adapter (peft.init_from) remembers everything that it trains.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class Layout(Protocol):
    """How the processes of a run hold a model, as far as its forward pass must know."""

    is_sharded: ClassVar[bool]  # layers are gathered as they are called: all processes have to call them equally often

    def parts(self, parameter: nn.Parameter, whole: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """What this process has of a parameter, each with the same part of `whole`."""
        ...

    def reshard(self, module: nn.Module) -> None:
        """Have what was gathered be gathered anew by whoever calls next."""
        ...


class _Whole:
    """Of a process that has all of every parameter."""

    is_sharded: ClassVar[bool] = False

    def parts(self, parameter: nn.Parameter, whole: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        return [(parameter.data, whole)]

    def reshard(self, module: nn.Module) -> None:
        """Nothing was."""


WHOLE: Layout = _Whole()

_STARTS: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()  # the base's own
_BEGINNINGS: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()  # all


def remember_start(model: nn.Module, own: set[int]) -> None:
    """Keep the values of the parameters that are trained and among the base's `own` (by id). They are few and small."""
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) in own
    }
    _STARTS[model] = {name: parameter.detach().clone() for name, parameter in trained.items()}


def start_of(model: nn.Module) -> dict[str, Tensor]:
    return _STARTS.get(model, {})


def remember_beginning(model: nn.Module) -> None:
    """Keep the values of all parameters that are trained, as a run's first step finds them: an adapter's own size."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _BEGINNINGS[model] = {name: parameter.detach().clone() for name, parameter in trained.items()}


def beginning_of(model: nn.Module) -> dict[str, Tensor]:
    return _BEGINNINGS.get(model, {})


@contextmanager
def at_start(module: nn.Module, start: dict[str, Tensor], layout: Layout) -> Iterator[None]:
    """Parameters of `module` as they were. By `.data`: what a backward pass has kept of them is theirs again before it runs."""
    parts = [pair for name, value in start.items() for pair in layout.parts(module.get_parameter(name), value)]
    trained = [live.clone() for live, _ in parts]
    with torch.no_grad():
        for live, was in parts:
            live.copy_(was)
    try:
        yield
    finally:
        with torch.no_grad():
            for (live, _), value in zip(parts, trained, strict=True):
                live.copy_(value)
