"""Checks of what a loss returns, which may be a user's own: the wrong shape or name would be a wrong number without a word."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from halos.errors import UserError
from halos.metrics import PART
from halos.types import Loss, Mean

# names of a line of metrics.jsonl that the trainer fills, and of what the ranks sum with the metrics
RESERVED = frozenset((
    "loss", "router_aux_loss", "kl_coefficient", "entropy_coefficient", "grad_norm", "stop", "written", "step", "split", "lr",
    "examples", "tokens", "skipped_steps", "seconds", "seconds/sample", "seconds/score", "seconds/train", "tokens_per_second",
    "peak_memory_mb",
))  # fmt: skip


def checked_loss(loss: Any, name: str, policy: Any, items: int) -> Loss:
    """Return what the loss `name` returned. Raises UserError where that is wrong. `policy`: its first argument."""
    if not isinstance(loss, Loss):
        raise UserError(f"the loss {name} returns a {type(loss).__name__}: return a halos.types.Loss")
    for term in loss.terms.values():
        if not isinstance(term.values, Tensor):
            raise UserError(f"the loss {name} returns a {type(term.values).__name__} as its values: return a tensor of losses")
        _refuse_shape(term, name, policy, items)
    if torch.is_grad_enabled() and not loss.values.requires_grad and any(part.requires_grad for part in _tensors(policy)):
        _refuse_constant(loss.values, name)
    refuse_metrics(loss.metrics, name)
    return _exact(loss)


def _refuse_shape(loss: Loss, name: str, policy: Any, items: int) -> None:
    """Raises UserError for a denominator that is not counted, and values that are not of items or tokens."""
    per = ("item", "token", *(f"{each}_token" for each in type(policy).example.completed))
    if loss.per not in per:
        raise UserError(f"the loss {name} returns per={loss.per!r}: it is {' or '.join(per)}")
    widths = {tensor.shape[1] for tensor in _tensors(policy) if tensor.ndim == 2}
    shape, allowed = tuple(loss.values.shape), [(items,), *((items, width) for width in sorted(widths))]
    if shape not in allowed:
        raise UserError(
            f"the loss {name} returns values of shape {shape} for {items} items: the loss of each item"
            f"{' or token' if widths else ''}, not reduced, has the shape {' or '.join(map(str, allowed))}"
        )


def _exact(loss: Loss) -> Loss:
    """Return the loss in at least float32: half precision would lose digits of the sum."""
    values = loss.values if loss.values.dtype in (torch.float32, torch.float64) else loss.values.float()
    parts = {name: _exact(part) for name, part in loss.parts.items()}
    unchanged = values is loss.values and all(part is loss.parts[name] for name, part in parts.items())
    return loss if unchanged else replace(loss, values=values, parts=parts)


def _refuse_constant(values: Tensor, name: str) -> None:
    """Raises UserError for losses that no weight would learn from. Zeros are what a batch may give that has nothing to learn, and
    what is not finite has its step skipped."""
    if (values.isfinite() & (values != 0)).any():
        raise UserError(
            f"the loss {name} returns values without a gradient: compute them from its first argument, neither detached nor as"
            " numbers of Python"
        )


def refuse_metrics(metrics: Mapping[str, Any], loss: str) -> None:
    """Raises UserError for metrics of a loss that are no means, or have the name of one that the trainer logs."""
    if not isinstance(metrics, Mapping):
        raise UserError(f"the loss {loss} returns a {type(metrics).__name__} as its metrics: return a dict of halos.types.Mean")
    for name, mean in metrics.items():
        if not isinstance(name, str):
            raise UserError(f"the loss {loss} returns a metric {name}, whose name is a {type(name).__name__}: names are text")
        if name in RESERVED or name.startswith(PART):
            raise UserError(f"the loss {loss} returns a metric {name}, which is the trainer's: give it another name")
        if not isinstance(mean, Mean):
            raise UserError(f"the loss {loss} returns a {type(mean).__name__} as metric {name}: return halos.types.Mean.of(...)")
        if not all(isinstance(part, Tensor) and part.shape == () for part in (mean.total, mean.count)):
            raise UserError(
                f"the loss {loss}: total and count of its metric {name} are no tensors of shape (): use halos.types.Mean.of"
            )


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
