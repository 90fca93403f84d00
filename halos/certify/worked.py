"""Worked examples: numbers that somebody computed by hand, and the comparison of a loss with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from halos.config.bind import LossSpec
from halos.config.signature import keywords, positional
from halos.errors import UserError
from halos.trainers.humanline import Humanline
from halos.types import Estimates, Loss, Mismatched, Sampled, TokenLogps

TOLERANCE = 2e-6  # of numbers that are written with six digits, relative to those above 1
RESULTS = ("values", "per", "gradient", "metrics", "advantages", "returns", "after", "start")
PARTS = {"sampled": "advantages", "start": "start", "totals": "update"}  # of an example, and the function that it is of
Ragged = dict[str, Tensor]  # the tensors that gradients are taken of, by name
Namespace = Mapping[str, Any]  # what the names of the loss's module mean: it, or a mutant of it


@dataclass(frozen=True, slots=True)
class Worked:
    """What a loss declares beside its function, as EXAMPLES and EXEMPT, or what --examples says of it."""

    examples: Sequence[Mapping[str, Any]] = ()
    exempt: Mapping[str, str] = field(default_factory=dict)  # a check, or the text of a mutant: why it does not count


def settings_of(spec: LossSpec, example: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that an example depends on: its own, and the others of its function as the loss has them."""
    function = next((PARTS[part] for part in PARTS if part in example), function_of(spec).__name__)
    keys = _keys(function_of(spec).__module__, function)
    keys += _keys(function_of(spec).__module__, "statistics") if spec.statistics is not None else ()
    return {name: spec.settings[name] for name in keys if name in spec.settings} | dict(example.get("keys", {}))


def problem(spec: LossSpec, namespace: Namespace, example: Mapping[str, Any]) -> str | None:
    """The first number in which the loss differs from the example; None where it has them all."""
    return first_difference(_results(spec, namespace, example, settings_of(spec, example)))


def first_difference(results: Iterable[tuple[str, Any, Any]]) -> str | None:
    """From names of results, what they should be and what they are."""
    return next((wrong for result in results if (wrong := _differs(*result)) is not None), None)


def _results(
    spec: LossSpec, namespace: Namespace, example: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Names of results with what they should be and what they are."""

    def call(name: str, *arguments: Any) -> Any:
        keys = _keys(function_of(spec).__module__, name)
        return namespace[name](*arguments, **{key: settings[key] for key in keys if key in settings})

    if "sampled" in example:
        estimates: Estimates = call("advantages", built(Sampled, example["sampled"]))
        computed = {"advantages": estimates.advantages, "returns": estimates.returns}
        yield from ((name, example[name], computed[name]) for name in computed if name in example)
        yield from metrics(example, estimates.metrics)
        return
    if "start" in example:
        yield "start", example["start"], call("start")
        return
    if "totals" in example:
        yield "after", example["after"], call("update", example["state"], example["totals"])
        return
    function, leaves = function_of(spec), Ragged()
    loss: Loss = call(function.__name__, *_arguments(spec, call, example, leaves))
    expected = example["values"]
    if isinstance(expected, Mapping):
        yield from ((f"values of {name}", each, loss.parts[name].values) for name, each in expected.items())
        yield from (("per", per, loss.parts[name].per) for name, per in example.get("per", {}).items())
    else:
        yield "values", expected, loss.values
        yield "per", example.get("per", "item"), loss.per
    yield from gradients(example, loss.values.sum(), leaves)
    yield from metrics(example, loss.metrics)


def gradients(example: Mapping[str, Any], total: Tensor, leaves: Ragged) -> Iterator[tuple[str, Any, Any]]:
    """The gradients of `total` that an example gives, by the names of their tensors."""
    if "gradient" in example:
        computed = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        by_name = dict(zip(leaves, computed, strict=True))
        yield from (
            (f"gradient {name}".strip(), each, as_ragged(by_name[name], each)) for name, each in _flat(example["gradient"])
        )


def metrics(example: Mapping[str, Any], means: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    yield from ((f"metric {name}", each, _mean(means[name])) for name, each in example.get("metrics", {}).items())


@cache
def _keys(module: str, name: str) -> tuple[str, ...]:
    return tuple(keywords(vars(sys.modules[module])[name]))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def function_of(spec: LossSpec) -> Any:
    """The loss's function itself."""
    return getattr(spec.function, "func", spec.function)


def _arguments(spec: LossSpec, call: Callable[..., Any], example: Mapping[str, Any], leaves: Ragged) -> list[Any]:
    """The loss's positional arguments; `leaves` gets the tensors of the first, by name."""
    function = function_of(spec)
    names, hints = positional(function), _hints(function)
    inputs = [
        None if example.get(name) is None else built(hints[name], example[name], leaves if name == names[0] else None)
        for name in names if name not in ("statistics", "state")
    ]  # fmt: skip
    arguments = _modified(example, inputs)
    given = example.get("statistics")
    if "statistics" in names and (given is None or isinstance(given, Mapping)):
        rows = [built(Mismatched, {"completion": each}) for each in (given or {}).values()]
        arguments.append(call("statistics", *(_modified(example, rows) if rows else arguments)).detach())
    elif "statistics" in names:
        arguments.append(built(hints["statistics"], given))
    return [*arguments, *([example.get("state")] if "state" in names else [])]


def _modified(example: Mapping[str, Any], inputs: list[Any]) -> list[Any]:
    """Policy and reference, the first clamped where the example is one under humanline."""
    if "humanline" not in example:
        return inputs
    policy, reference = inputs
    return [clamped(Humanline(**example["humanline"]), policy, reference), reference]


def clamped(bounds: Humanline, policy: Any, reference: Any) -> Any:
    """An input type with each TokenLogps in it clamped to the reference's; the trainer clamps a model's before it makes one."""
    if isinstance(policy, TokenLogps):
        return bounds.clamp(policy, reference)[0]
    names = [each.name for each in fields(policy) if is_dataclass(getattr(policy, each.name))]
    return replace(policy, **{name: clamped(bounds, getattr(policy, name), getattr(reference, name)) for name in names})


# --- from lists to input types -----------------------------------------------------------------------------------------


def built(kind: Any, given: Any, leaves: Ragged | None = None, name: str = "") -> Any:
    """An input type from lists: of TokenLogps ragged rows, or a mapping of its fields; of others a mapping of their fields."""
    kind = next((each for each in get_args(kind) if each is not type(None)), kind) if get_args(kind) else kind
    if kind is Tensor:
        return _leaf(_tensor(given), leaves, name)
    if isinstance(kind, type) and issubclass(kind, TokenLogps):
        columns = given if isinstance(given, Mapping) else {"values": given}
        lengths = torch.tensor([[len(row)] for row in columns["values"]])
        mask = torch.arange(max(1, int(lengths.max()))) < lengths
        tensors = {part: _tensor(rows) for part, rows in columns.items()}
        values = _leaf(tensors.pop("values"), leaves, name)
        return kind(values, mask, **{part: _leaf(each, leaves, f"{name}.{part}".strip(".")) for part, each in tensors.items()})
    if not is_dataclass(kind) or not isinstance(given, Mapping):
        raise UserError(f"an example gives {name or 'an input'} as {given!r}: lists of numbers, or a mapping of fields")
    hints = _hints(kind)
    if unknown := given.keys() - {each.name for each in fields(kind)}:
        raise UserError(f"an example gives {', '.join(sorted(unknown))}: {kind.__name__} has {', '.join(hints)}")
    parts = {each.name: built(hints[each.name], given[each.name], leaves, f"{name}.{each.name}".strip("."))
             if given.get(each.name) is not None else None for each in fields(kind)}  # fmt: skip
    return kind(**parts)


def _leaf(value: Tensor, leaves: Ragged | None, name: str) -> Tensor:
    if leaves is not None and value.is_floating_point():
        leaves[name] = value.requires_grad_()
    return value


def _tensor(given: Any) -> Tensor:
    """Numbers as they are, ragged rows padded with 0; floats in float64."""
    if isinstance(given, Sequence) and given and isinstance(given[0], Sequence):
        width, nested = max(1, *map(len, given)), next((row[0] for row in given if row), 0.0)
        nothing = [0.0] * len(nested) if isinstance(nested, Sequence) else 0.0
        given = [[*row, *[nothing] * (width - len(row))] for row in given]
    tensor = torch.tensor(given)
    return tensor.double() if tensor.is_floating_point() else tensor


# --- comparison --------------------------------------------------------------------------------------------------------


def _flat(given: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(given, Mapping):
        for key, each in given.items():
            yield from _flat(each, f"{name}.{key}".strip("."))
    else:
        yield name, given


def as_ragged(computed: Tensor | None, rows: Sequence[Any]) -> Tensor | None:
    """A tensor (rows, time), such as a gradient, with zeros beyond the rows of the example: what padding gets does not count."""
    if computed is None or computed.ndim < 2:
        return computed
    lengths = torch.tensor([len(row) for row in rows]).view(-1, *[1] * (computed.ndim - 1))
    inside = torch.arange(computed.shape[1]).view(1, -1, *[1] * (computed.ndim - 2)) < lengths
    return torch.where(inside, computed, 0.0)[:, : max(1, int(lengths.max()))]


def _mean(mean: Any) -> Tensor:
    return mean.total / mean.count


def _differs(name: str, expected: Any, computed: Any) -> str | None:
    if isinstance(expected, str):
        return None if expected == computed else f"{name} is {computed}, not {expected}"
    if isinstance(expected, Mapping):
        wrong = [key for key, each in expected.items() if abs(computed[key] - each) > TOLERANCE * max(1.0, abs(each))]
        return f"{name}: {wrong[0]} is {computed[wrong[0]]:.7g}, not {expected[wrong[0]]:.7g}" if wrong else None
    wanted = _tensor(expected).double()
    if computed is None:
        return f"there is no {name}"
    got = torch.as_tensor(computed).detach().double()
    if got.shape != wanted.shape:
        return f"{name} has the shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    off = ~((got - wanted).abs() <= TOLERANCE * wanted.abs().clamp(min=1.0))  # NaN too
    if not off.any():
        return None
    at = tuple(off.nonzero()[0].tolist())
    return f"{name}{list(at) if at else ''} is {got[at].item():.7g}, not {wanted[at].item():.7g}"


def legal(spec: LossSpec, example: Mapping[str, Any]) -> None:
    """Raises UserError for an example that has no result, or parts that the loss does not take."""
    takes = (*positional(function_of(spec)), "keys", "sampled", "totals", "state", "humanline", *RESULTS)
    if unknown := [name for name in example if name not in takes]:
        raise UserError(f"an example of {spec.name} has {unknown[0]!r}: it may have {', '.join(takes)}")
    if not {"values", "advantages", "returns", "after", "start"} & example.keys():
        raise UserError(f"an example of {spec.name} has no result: give values, or advantages with sampled")
