"""What every merged tensor must be, worked out again in float64 and apart from the code that merges.

Rank and scale are read from adapter_config.json as PEFT reads it, the update is the plain formula, and what was written is
read back from the disk.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halos import confined
from halos.errors import UserError
from halos.merge.base_weights import Source, unwrapped
from halos.merge.expected_experts import Factors, Landing, Named, landings, named_by_peft
from halos.merge.safetensors_io import INDEX, SafeFile, spans, weight_files

NOISE = 1e-13  # of a tensor's largest value: float64 products of a few dozen terms, summed in another order
THROUGH = torch.finfo(torch.float32).eps / 2  # what goes from float64 to a half type passes float32
HALVES = (torch.bfloat16, torch.float16)
Rows = Callable[[int, int], Tensor]  # (first, last) -> float64


@dataclass(frozen=True, slots=True)
class Truth:
    """A tensor as it must be."""

    shape: list[int]
    rows: Rows
    floating: bool = True
    wide: Sequence[torch.dtype] = ()  # of a model in which it is float32 nevertheless


@dataclass(frozen=True, slots=True)
class Wanted:
    """The merged model as it must be."""

    tensors: dict[str, Truth]
    tied: bool  # whether one table serves as embedding and head
    scales: dict[str, float]  # what each layer's update is multiplied by
    updated: set[str]  # tensors that those change


@dataclass(frozen=True, slots=True)
class Found:
    """How far a tensor on the disk is from the truth."""

    name: str
    error: float  # the largest difference over the largest value
    allowed: float  # the largest difference as a share of what rounding explains; above 1 it is wrong


def truths(base: Path, adapter: Path | None, model: PreTrainedModel, vocabulary: int, tokens: Sequence[int]) -> Wanted:
    """Every tensor that the merged model must have, and no other. Without an adapter: the base itself."""
    source = Source(base, model)
    delta = SafeFile(adapter / "adapter_model.safetensors") if adapter else None
    config = confined.load_object(adapter / "adapter_config.json") if adapter else {}
    changes = _Changes(delta, config, source.kinds, named_by_peft(model, config))
    touched = changes.names
    places = landings(model, [part for part in source.parts if part.whole in touched])
    tables = {source.embedding, source.head}
    found: dict[str, Truth] = {}
    for name, (file, mine) in source.tensors.items():
        start = _grown(file, name, vocabulary, tokens) if mine in source.tables and adapter else _as_it_is(file, name)
        wide = [half for half in HALVES if source.dtype_of(mine, half) is torch.float32]
        found[name] = replace(changes.applied(mine, start, places.get(name)), wide=wide)
    if source.absent and not touched.isdisjoint(tables):
        mine, twin = source.absent
        found[mine] = changes.applied(mine, _grown(*source.where[twin], vocabulary, tokens))
    for mine in changes.whole.keys() - source.where.keys():
        found[mine] = changes.applied(mine, Truth([], lambda *_: torch.empty(0)))
    tied = source.tied_by_config and not source.diverged and touched.isdisjoint(tables)
    updated = {name for name, (_, mine) in source.tensors.items() if mine in changes.updated}
    return Wanted(found, tied, changes.scales, updated)


def copy_of(model: Path, wide: Collection[str] = ()) -> dict[str, Truth]:
    """A model's tensors as they are, of which those of the names `wide` are float32 in a model of any dtype."""
    found = {name: _as_it_is(file, name) for file in map(SafeFile, weight_files(model)) for name in file.names}
    return {name: replace(truth, wide=HALVES if name in wide else ()) for name, truth in found.items()}


def _as_it_is(file: SafeFile, name: str) -> Truth:
    shape = file.shape(name)

    def rows(first: int, last: int) -> Tensor:
        return file.rows(name, first, last).double() if shape else file.read(name).double()

    return Truth(shape, rows, file.dtype(name).is_floating_point)


def _grown(file: SafeFile, name: str, vocabulary: int, tokens: Sequence[int]) -> Truth:
    """A table with a row for each id: rows of new ones are the mean of those that the base knows."""
    known, *width = file.shape(name)
    fresh = torch.zeros(max(known, vocabulary), dtype=torch.bool)
    fresh[known:] = True
    fresh[list(tokens)] = True
    if not fresh.any():
        return _as_it_is(file, name)
    old = int(fresh.nonzero()[0])
    mean = torch.zeros(width, dtype=torch.float64)
    for first, last in spans([old, *width]):
        mean += file.rows(name, first, last).double().sum(0) / old

    def rows(first: int, last: int) -> Tensor:
        result = mean.expand(last - first, *width).clone()
        kept = ~fresh[first:last]
        if kept.any():
            result[kept] = file.rows(name, first, min(last, known)).double()[kept[: min(last, known) - first]]
        return result

    return Truth([len(fresh), *width], rows)


class _Changes:
    """What an adapter does, by its own configuration."""

    def __init__(
        self, file: SafeFile | None, config: Mapping[str, Any], kinds: Mapping[str, nn.Module], parameters: Mapping[str, Named]
    ) -> None:
        self._file, self._config, self._kinds = file, config, kinds
        self._parameters = {named.parameter: named for named in parameters.values()}
        self._factors = lru_cache(2)(self._factors_of)  # both of a layer, whose experts follow each other
        self._parts: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        for name in file.names if file else []:
            bare = name.removeprefix("base_model.model.")
            layer, mark, part = bare.partition(".lora_")
            layer = parameters[layer].parameter if layer in parameters else layer
            if mark:
                self._parts.setdefault(layer, {})[part.removesuffix(".weight")] = name
            elif "original_module" not in bare.split("."):
                self.whole[unwrapped(bare)] = name

    @property
    def names(self) -> set[str]:
        return self.updated | self.whole.keys()

    @cached_property
    def updated(self) -> set[str]:
        """Tensors that factors change."""
        names = {layer if layer in self._parameters else f"{layer}.weight" for layer in self._parts}
        return names - self.whole.keys()

    def applied(self, mine: str, start: Truth, place: Landing | None = None) -> Truth:
        if self._file is not None and mine in self.whole:
            return _as_it_is(self._file, self.whole[mine])
        if mine not in self.updated:
            return start
        if (named := self._parameters.get(mine)) and named.experts > 1:
            return self._of_experts(mine, start, place)
        return self._updated(mine if named else mine.removesuffix(".weight"), start)

    def _of_experts(self, mine: str, start: Truth, place: Landing | None) -> Truth:
        """A parameter of three dimensions as the files hold it: whole, or the tensor that lands at `place`."""
        a, b = (self._shape_of(mine, side) for side in "AB")
        if start.shape != (wanted := self._parameters[mine].shape_of(a, b, place)):
            raise UserError(f"{mine} is {start.shape} in the files, and its adapter is for {wanted}")
        return Truth(start.shape, lambda first, last: start.rows(first, last) + self._factors(mine).delta(place, first, last))

    def _factors_of(self, mine: str) -> Factors:
        assert self._file is not None
        a, b = (self._file.read(self._factor(mine, side)) for side in "AB")
        return Factors(a, b, self._scale(mine), self._parameters[mine].experts, self._parameters[mine].transposed)

    def _shape_of(self, layer: str, side: str) -> list[int]:
        assert self._file is not None
        return self._file.shape(self._factor(layer, side))

    def _read(self, name: str) -> Tensor:
        assert self._file is not None
        return self._file.read(name).double()

    def _updated(self, layer: str, start: Truth) -> Truth:
        parts = self._parts[layer]
        a, b = (self._read(self._factor(layer, side)) for side in "AB")
        b = b * self._scale(layer)
        inputs_first = isinstance(self._kinds.get(layer), Conv1D | nn.Embedding)
        if start.shape != ([a.shape[1], len(b)] if inputs_first else [len(b), a.shape[1]]):
            raise UserError(f"{layer} is {start.shape} and its adapter is for {len(b)} outputs of {a.shape[1]} inputs")

        def plain(first: int, last: int) -> Tensor:
            delta = (b @ a[:, first:last]).T if inputs_first else b[first:last] @ a
            return start.rows(first, last) + delta

        if self._config.get("use_dora"):
            magnitude = self._read(parts["magnitude_vector"])
            return Truth(start.shape, _normed(plain, start.shape, magnitude, inputs_first=inputs_first))
        return Truth(start.shape, plain)

    def _factor(self, layer: str, side: str) -> str:
        parts = self._parts[layer]
        return parts.get(side) or parts[f"embedding_{side}"]

    @property
    def scales(self) -> dict[str, float]:
        return {layer: self._scale(layer) for layer in self._parts}

    def _scale(self, layer: str) -> float:
        rank = self._shape_of(layer, "A")[0]
        rank = rank // self._parameters[layer].experts if layer in self._parameters else rank
        if rank not in (said := self._said("rank_pattern", layer, self._config["r"])):
            raise UserError(f"{layer} has rank {rank} in the adapter and {said.pop():g} in its configuration")
        (alpha, *others) = self._said("alpha_pattern", layer, self._config["lora_alpha"])
        if others:
            raise UserError(f"{layer} has more than one alpha in the adapter's configuration")
        return alpha / (rank**0.5 if self._config.get("use_rslora") else rank)

    def _said(self, key: str, layer: str, default: float) -> set[float]:
        """All that the patterns say of a layer: which of them comes first is not told."""
        patterns = (self._config.get(key) or {}).items()
        return {float(value) for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", layer)} or {float(default)}


def _normed(plain: Rows, shape: list[int], magnitude: Tensor, *, inputs_first: bool) -> Rows:
    """Each output's weights brought to the length that DoRA learnt for it."""
    if not inputs_first:
        return lambda first, last: (block := plain(first, last)) * (magnitude[first:last] / block.norm(dim=1)).unsqueeze(1)
    squares = torch.zeros(shape[1], dtype=torch.float64)
    for span in spans(shape):
        squares += plain(*span).square().sum(0)
    return lambda first, last: plain(first, last) * (magnitude / squares.sqrt())


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(merged: Path, wanted: Mapping[str, Truth], dtype: torch.dtype | None) -> tuple[list[Found], list[str]]:
    """Each tensor of `merged` against the truth, the worst first; and all that is wrong with files, names, shapes, dtypes."""
    faults, places = [], {}
    for path in weight_files(merged):
        file = SafeFile(path)
        places |= {name: file for name in file.names}
    faults += [f"{name} is missing" for name in sorted(wanted.keys() - places.keys())]
    faults += [f"{name} does not belong there" for name in sorted(places.keys() - wanted.keys())]
    faults += _of_index(merged, places)
    found = []
    for name in sorted(wanted.keys() & places.keys()):
        truth, file = wanted[name], places[name]
        kind = torch.float32 if dtype in truth.wide else dtype
        if file.shape(name) != truth.shape:
            faults.append(f"{name} is {file.shape(name)} instead of {truth.shape}")
        elif truth.floating and dtype is not None and file.dtype(name) is not kind:
            faults.append(f"{name} is {file.dtype(name)} instead of {kind}")
        else:
            found.append(_distance(name, file, truth))
    found.sort(key=lambda each: -each.allowed if each.allowed == each.allowed else float("-inf"))
    faults += [f"{each.name} is off by {each.error:.1e} of its largest value" for each in found if not each.allowed <= 1]
    return found, faults


def _of_index(merged: Path, places: Mapping[str, SafeFile]) -> list[str]:
    stray = {path.name for path in merged.glob("*.safetensors")} - {file.path.name for file in places.values()}
    faults = [f"{name} belongs to no model here" for name in sorted(stray)]
    if (merged / INDEX).is_file():
        weight_map = json.loads((merged / INDEX).read_text())["weight_map"]
        listed = {name: file.path.name for name, file in places.items()}
        faults += [f"{name} is not where the index says" for name in sorted(listed.keys() | weight_map.keys())
                   if listed.get(name) != weight_map.get(name)]  # fmt: skip
    return faults


def is_rounded(block: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether each value is what is `wanted`, rounded once."""
    allowed = _half_unit(wanted, torch.finfo(dtype)) + NOISE * wanted.abs().max()
    return bool(((block.double() - wanted).abs() <= allowed).all())


def _distance(name: str, file: SafeFile, truth: Truth) -> Found:
    """A value may be off by half a unit in its last place, since it was rounded once, and by float64's own noise."""
    kind = torch.finfo(file.dtype(name)) if truth.floating else None
    largest = max((truth.rows(*span).abs().max().item() for span in spans(truth.shape)), default=0.0)
    error, allowed = 0.0, 0.0
    for first, last in spans(truth.shape):
        wanted = truth.rows(first, last)
        have = file.rows(name, first, last) if truth.shape else file.read(name)
        off = (have.double() - wanted).abs()
        share = off / (_half_unit(wanted, kind) + NOISE * largest + 1e-300)
        error, allowed = _worse(error, off.max().item()), _worse(allowed, share.max().item())
    return Found(name, error / (largest or 1.0), allowed)


def _half_unit(values: Tensor, kind: torch.finfo | None) -> Tensor:
    """Half the distance between neighbours in a type, at each of `values`."""
    if kind is None:
        return torch.zeros_like(values)
    places = torch.frexp(values.abs().clamp(min=kind.smallest_normal)).exponent - 1
    half = torch.ldexp(torch.full_like(values, kind.eps / 2), places)
    return half if kind.bits >= 32 else half + THROUGH * values.abs()


def _worse(one: float, other: float) -> float:
    """The larger, where not-a-number is the largest."""
    return other if other > one or other != other else one
