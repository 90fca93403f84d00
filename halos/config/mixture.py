"""Bind loss=mixture: its parts are losses by themselves, which share the model's output and the data of the richest of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from halos.config.loss_spec import LossSpec
from halos.config.mixture_parts import completed, keys_of
from halos.config.signature import fit_one
from halos.config.suggest import nearest
from halos.errors import UserError
from halos.losses.mixture import given_to, in_terms_of, mixture, serves
from halos.ranges import Range
from halos.types import Loss, LossInput, Mismatched

Bind = Callable[[Mapping[str, Any], Sequence[str], str], LossSpec]


@dataclass(frozen=True, slots=True)
class Part:
    """A loss of a mixture, bound."""

    name: str
    weight: float
    loss: LossSpec


def bind_mixture(settings: Mapping[str, Any], plugins: Sequence[str], bind: Bind) -> LossSpec:
    """Bind all parts by `bind`. Raises UserError for keys that they do not take, and for parts that no data serves together."""
    if other := next((name for name in settings if name not in ("_target_", "parts")), None):
        meant = f" (did you mean parts.{near}?)" if (near := nearest(other, settings.get("parts") or ())) else ""
        raise UserError(f"loss.{other}: mixture takes no {other!r}; it takes parts{meant}")
    whole = completed(settings)["parts"]
    parts = [_part(name, node, plugins, bind) for name, node in whole.items()]
    inputs = _richest(parts)
    started = {f"{part.name}/{name}": value for part in parts for name, value in (part.loss.start or {}).items()}
    with_statistics = [part.loss for part in parts if part.loss.statistics is not None]
    needs_reference = any(part.loss.needs_reference for part in parts)
    return LossSpec(
        name="mixture",
        function=_function(parts, inputs, needs_reference=needs_reference),
        inputs=inputs,
        needs_reference=needs_reference,
        takes_reference=needs_reference,
        statistics=_statistics(with_statistics[0]) if with_statistics else None,
        statistics_inputs=_read_by_statistics(with_statistics[0], inputs) if with_statistics else None,
        examples=None,
        example_type=None,
        settings={"parts": {part.name: {"weight": part.weight, **part.loss.settings} for part in parts}},
        start=started or None,
        update=_update(parts) if started else None,
        token_statistics=tuple(dict.fromkeys(each for part in parts for each in part.loss.token_statistics)),
        derived=_derived(parts),
    )


def _part(name: str, node: Mapping[str, Any], plugins: Sequence[str], bind: Bind) -> Part:
    key = f"loss.parts.{name}"
    weight = fit_one(node["weight"], Annotated[float, Range(above=0)], f"{key}.weight")
    loss = bind(keys_of(node), plugins, key)
    if loss.on_rollouts:
        raise UserError(f"{key}: {loss.name} learns from rollouts by advantages of its own: it is no part of a mixture")
    if loss.examples is not None:
        raise UserError(f"{key}: {loss.name} rewrites the rows that it trains on, which the other parts would read too")
    if loss.candidates:
        raise UserError(f"{key}: {loss.name} has a teacher, which is no reference of other parts: it is no part of a mixture")
    return Part(name, weight, loss)


def _richest(parts: Sequence[Part]) -> type[LossInput]:
    """Return the input type that serves all parts. Raises UserError where there is none."""
    kinds = list(dict.fromkeys(part.loss.inputs for part in parts))
    for kind in kinds:
        if all(serves(kind, other) for other in kinds):
            with_statistics = [part.name for part in parts if part.loss.statistics is not None]
            if len(with_statistics) > 1:
                raise UserError(f"loss.parts: {' and '.join(with_statistics)} each read the whole global batch: give one of them")
            return kind
    first = {kind: next(part.name for part in parts if part.loss.inputs is kind) for kind in kinds}
    data = "; ".join(f"{name} learns from {kind.example.columns or kind.__name__}" for kind, name in first.items())
    raise UserError(f"loss.parts do not fit together: {data}. Pairs serve losses on pairs, and sft and dft of what was chosen")


def _function(parts: Sequence[Part], inputs: type[LossInput], *, needs_reference: bool) -> Callable[..., Loss]:
    def function(policy: Any, *more: Any) -> Loss:
        rest, losses = list(more), dict[str, Loss]()
        reference = rest.pop(0) if needs_reference else None
        statistics = rest.pop(0) if any(part.loss.statistics is not None for part in parts) else None
        state: Mapping[str, float] = rest.pop(0) if rest else {}
        for part in parts:
            spec, wanted = part.loss, part.loss.inputs
            arguments = [given_to(wanted, policy)]
            arguments += [given_to(wanted, reference)] if spec.needs_reference and reference is not None else spec.unneeded
            arguments += [statistics] if spec.statistics is not None else []
            arguments += [_of(part.name, state)] if spec.start is not None else []
            losses[part.name] = in_terms_of(inputs, wanted, spec.function(*arguments))
        return mixture(losses, {part.name: part.weight for part in parts})

    return function


def _statistics(loss: LossSpec) -> Callable[..., Tensor]:
    """Those of the one part that has some, which gets no reference where it needs none."""
    assert loss.statistics is not None
    function, count, wanted = loss.statistics, 1 + loss.needs_reference, loss.inputs

    def statistics(*given: Any) -> Tensor:
        known = (each if isinstance(each, Mismatched) else given_to(wanted, each) for each in given[:count])
        return function(*known, *loss.unneeded)

    return statistics


def _read_by_statistics(loss: LossSpec, inputs: type[LossInput]) -> type:
    return Mismatched if loss.statistics_inputs is Mismatched else inputs


def _update(parts: Sequence[Part]) -> Callable[..., dict[str, float]]:
    def update(state: Mapping[str, float], totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        after = dict(state)
        for part in parts:
            if part.loss.update is not None:
                own = part.loss.update(_of(part.name, state), _of(part.name, totals))
                after |= {f"{part.name}/{name}": value for name, value in own.items()}
        return after

    return update


def _derived(parts: Sequence[Part]) -> Callable[[Mapping[str, float]], dict[str, float]]:
    """Of each part the metrics that follow from its own."""

    def derived(means: Mapping[str, float]) -> dict[str, float]:
        found = {}
        for part in parts:
            own = _of(part.name, means)
            if (value := means.get(f"loss/{part.name}")) is not None:
                own["loss"] = value / part.weight
            found |= {f"{part.name}/{name}": value for name, value in part.loss.derive(own).items()} if own else {}
        return found

    return derived


def _of(part: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands under a part's name."""
    return {name.removeprefix(f"{part}/"): value for name, value in named.items() if name.startswith(f"{part}/")}
