"""Checks of what a loss returns, which may be a user's own: the wrong shape or name would be a wrong number without a word."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from halos.errors import UserError
from halos.types import Loss, Mean

PER = ("item", "token")  # what `Loss.per` may be
# names of a line of metrics.jsonl that the trainer fills, and of what the ranks sum with the metrics
RESERVED = frozenset((
    "loss", "router_aux_loss", "kl_coefficient", "grad_norm", "stop", "written", "step", "split", "lr", "examples", "tokens",
    "skipped_steps", "seconds", "tokens_per_second", "peak_memory_mb",
))  # fmt: skip


def checked_loss(loss: Any, name: str, policy: Any, items: int) -> Loss:
    """Return what the loss `name` returned. Raises UserError where that is wrong. `policy`: its first argument."""
    if not isinstance(loss, Loss):
        raise UserError(f"the loss {name} returns a {type(loss).__name__}: return a halos.types.Loss")
    if loss.per not in PER:
        raise UserError(f"the loss {name} returns per={loss.per!r}: it is {' or '.join(PER)}")
    widths = {tensor.shape[1] for tensor in _tensors(policy) if tensor.ndim == 2}
    shape, allowed = tuple(loss.values.shape), [(items,), *((items, width) for width in sorted(widths))]
    if shape not in allowed:
        raise UserError(
            f"the loss {name} returns values of shape {shape} for {items} items: the loss of each item"
            f"{' or token' if widths else ''}, not reduced, has the shape {' or '.join(map(str, allowed))}"
        )
    refuse_metrics(loss.metrics, name)
    return loss


def refuse_metrics(metrics: Mapping[str, Any], loss: str) -> None:
    """Raises UserError for metrics of a loss that are no means, or have the name of one that the trainer logs."""
    for name, mean in metrics.items():
        if name in RESERVED:
            raise UserError(f"the loss {loss} returns a metric {name}, which is the trainer's: give it another name")
        if not isinstance(mean, Mean):
            raise UserError(f"the loss {loss} returns a {type(mean).__name__} as metric {name}: return halos.types.Mean.of(...)")


def checked_statistics(values: Any, name: str, items: int) -> Tensor:
    """Return the statistics of `items` items. Raises UserError where there is not one, or one row, for each."""
    if isinstance(values, Tensor) and values.shape[:1] == (items,):
        return values
    got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    raise UserError(f"the statistics of the loss {name} return {got} for {items} items: return one number, or one row, for each")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a loss's input type, and of the dataclasses in it."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for each in fields(value):
            yield from _tensors(getattr(value, each.name))
