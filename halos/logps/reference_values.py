"""Values of the trained parameters of a model with an adapter with which it computes as its own reference.

For most adapters only the base's own trained parameters, biases, are kept: with the adapter off they are set back to the base's
values. A run that starts from a trained adapter (peft.init_from), or whose reference moves, keeps values of all that it trains.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from halos.logps.working_weights import drop_casts


class Layout(Protocol):
    """How the ranks of a run shard a model, as far as its forward pass must know."""

    is_sharded: ClassVar[bool]  # layers are all-gathered as they are called, so all ranks must call them equally often

    def parts(self, parameter: nn.Parameter, whole: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """This rank's shards of a parameter, each with the same slice of `whole`."""
        ...

    def reshard(self, module: nn.Module) -> None:
        """Drop gathered parameters, so that the next call gathers them again."""
        ...


class _Unsharded:
    """The layout where every rank has all of every parameter."""

    is_sharded: ClassVar[bool] = False

    def parts(self, parameter: nn.Parameter, whole: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        return [(parameter.data, whole)]

    def reshard(self, module: nn.Module) -> None:
        """Nothing was gathered."""


UNSHARDED: Layout = _Unsharded()

_BASE_VALUES: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()  # of the base's own trained parameters
_REFERENCE_VALUES: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()  # of all trained parameters


def remember_base_values(model: nn.Module, own: set[int]) -> None:
    """Keep the values of those trained parameters that are the base's `own` (by id). They are few and small."""
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) in own
    }
    _BASE_VALUES[model] = {name: parameter.detach().clone() for name, parameter in trained.items()}


def base_values_of(model: nn.Module) -> dict[str, Tensor]:
    return _BASE_VALUES.get(model, {})


def remember_reference_values(model: nn.Module) -> None:
    """Keep the values of all trained parameters before a run's first step: as much memory as the adapter takes."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _REFERENCE_VALUES[model] = {name: parameter.detach().clone() for name, parameter in trained.items()}


def reference_values_of(model: nn.Module) -> dict[str, Tensor]:
    return _REFERENCE_VALUES.get(model, {})


@contextmanager
def with_values(module: nn.Module, values: dict[str, Tensor], layout: Layout) -> Iterator[None]:
    """Parameters of `module` set to `values`, and back on leaving. Through `.data`, without the version counter of autograd:
    tensors saved for a backward pass hold their own values again before it runs. Autocast keeps its casts of parameters until its
    context ends, so they are dropped both times."""
    parts = [pair for name, value in values.items() for pair in layout.parts(module.get_parameter(name), value)]
    trained = [shard.clone() for shard, _ in parts]
    with torch.no_grad():
        for shard, value in parts:
            shard.copy_(value)
    drop_casts()
    try:
        yield
    finally:
        with torch.no_grad():
            for (shard, _), value in zip(parts, trained, strict=True):
                shard.copy_(value)
        drop_casts()
