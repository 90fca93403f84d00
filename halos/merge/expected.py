"""The expected value of every merged tensor, computed in float64 independently of the code that merges.

Rank and scale are read from adapter_config.json as PEFT reads it, and the update is the plain formula.
"""

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
from halos.merge.base_weights import BaseWeights, unwrapped
from halos.merge.expected_experts import ExpertRows, Factors, TargetParameter, expert_rows, target_parameters
from halos.merge.safetensors_io import SafeFile, spans, weight_files

HALVES = (torch.bfloat16, torch.float16)
Rows = Callable[[int, int], Tensor]  # (first, last) -> float64


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """What a tensor of the merged model must be."""

    shape: list[int]
    rows: Rows
    floating: bool = True
    float32_in: Sequence[torch.dtype] = ()  # dtypes of a model in which this tensor stays float32


@dataclass(frozen=True, slots=True)
class ExpectedModel:
    """What the merged model must be."""

    tensors: dict[str, ExpectedTensor]
    tied: bool  # whether embedding and head share one table
    scales: dict[str, float]  # the factor of each layer's update
    updated: set[str]  # names of the tensors that LoRA factors change


def expected_model(
    base: Path, adapter: Path | None, model: PreTrainedModel, vocabulary: int, tokens: Sequence[int]
) -> ExpectedModel:
    """Return every tensor that the merged model must have, and no other. Without an adapter: the base itself."""
    weights = BaseWeights(base, model)
    delta = SafeFile(adapter / "adapter_model.safetensors") if adapter else None
    config = confined.load_object(adapter / "adapter_config.json") if adapter else {}
    changes = _AdapterChanges(delta, config, weights.modules, target_parameters(model, config))
    touched = changes.names
    rows = expert_rows(model, [tensor for tensor in weights.fused_tensors if tensor.parameter in touched])
    tables = {weights.embedding, weights.head}
    expected: dict[str, ExpectedTensor] = {}
    for name, (file, in_model) in weights.tensors.items():
        start = _grown(file, name, vocabulary, tokens) if in_model in weights.tables and adapter else _unchanged(file, name)
        float32_in = [half for half in HALVES if weights.dtype_of(in_model, half) is torch.float32]
        expected[name] = replace(changes.applied(in_model, start, rows.get(name)), float32_in=float32_in)
    if weights.absent and not touched.isdisjoint(tables):
        absent, tied_to = weights.absent
        expected[absent] = changes.applied(absent, _grown(*weights.locations[tied_to], vocabulary, tokens))
    for added in changes.replaced.keys() - weights.locations.keys():
        expected[added] = changes.applied(added, ExpectedTensor([], lambda *_: torch.empty(0)))
    tied = weights.tied_by_config and not weights.diverged and touched.isdisjoint(tables)
    updated = {name for name, (_, in_model) in weights.tensors.items() if in_model in changes.updated}
    return ExpectedModel(expected, tied, changes.scales, updated)


def expected_copy(model: Path, float32: Collection[str] = ()) -> dict[str, ExpectedTensor]:
    """Return a model's tensors unchanged; those named in `float32` stay float32 in a model of any dtype."""
    tensors = {name: _unchanged(file, name) for file in map(SafeFile, weight_files(model)) for name in file.names}
    return {name: replace(tensor, float32_in=HALVES if name in float32 else ()) for name, tensor in tensors.items()}


def _unchanged(file: SafeFile, name: str) -> ExpectedTensor:
    shape = file.shape(name)

    def rows(first: int, last: int) -> Tensor:
        return file.rows(name, first, last).double() if shape else file.read(name).double()

    return ExpectedTensor(shape, rows, file.dtype(name).is_floating_point)


def _grown(file: SafeFile, name: str, vocabulary: int, tokens: Sequence[int]) -> ExpectedTensor:
    """Return a table with a row for each token id: rows of new ids are the mean of the base's rows."""
    known, *width = file.shape(name)
    fresh = torch.zeros(max(known, vocabulary), dtype=torch.bool)
    fresh[known:] = True
    fresh[list(tokens)] = True
    if not fresh.any():
        return _unchanged(file, name)
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

    return ExpectedTensor([len(fresh), *width], rows)


class _AdapterChanges:
    """The changes that an adapter makes to its base, by its own configuration."""

    def __init__(
        self,
        file: SafeFile | None,
        config: Mapping[str, Any],
        modules: Mapping[str, nn.Module],
        targets: Mapping[str, TargetParameter],
    ) -> None:
        self._file, self._config, self._modules = file, config, modules
        self._targets = {target.parameter: target for target in targets.values()}
        self._factors = lru_cache(2)(self._factors_of)  # both parameters of a layer: its experts' tensors follow each other
        self._parts: dict[str, dict[str, str]] = {}
        self.replaced: dict[str, str] = {}
        for name in file.names if file else []:
            bare = name.removeprefix("base_model.model.")
            layer, mark, part = bare.partition(".lora_")
            layer = targets[layer].parameter if layer in targets else layer
            if mark:
                self._parts.setdefault(layer, {})[part.removesuffix(".weight")] = name
            elif "original_module" not in bare.split("."):
                self.replaced[unwrapped(bare)] = name

    @property
    def names(self) -> set[str]:
        return self.updated | self.replaced.keys()

    @cached_property
    def updated(self) -> set[str]:
        """Return the names of the tensors that LoRA factors change."""
        names = {layer if layer in self._targets else f"{layer}.weight" for layer in self._parts}
        return names - self.replaced.keys()

    def applied(self, name: str, start: ExpectedTensor, rows: ExpertRows | None = None) -> ExpectedTensor:
        """Return the merged tensor of the model's `name`, of which the files hold `start`: all of it, or these `rows`."""
        if self._file is not None and name in self.replaced:
            return _unchanged(self._file, self.replaced[name])
        if name not in self.updated:
            return start
        if (target := self._targets.get(name)) and target.experts > 1:
            return self._updated_experts(name, start, rows)
        return self._updated(name if target else name.removesuffix(".weight"), start)

    def _updated_experts(self, name: str, start: ExpectedTensor, rows: ExpertRows | None) -> ExpectedTensor:
        """Update a stacked parameter: all of it, or the tensor of the files that becomes `rows` of it."""
        a, b = (self._shape_of(name, side) for side in "AB")
        if start.shape != (shape := self._targets[name].shape_of(a, b, rows)):
            raise UserError(f"{name} is {start.shape} in the files, and its adapter is for {shape}")
        return ExpectedTensor(
            start.shape, lambda first, last: start.rows(first, last) + self._factors(name).delta(rows, first, last)
        )

    def _factors_of(self, name: str) -> Factors:
        assert self._file is not None
        a, b = (self._file.read(self._factor(name, side)) for side in "AB")
        return Factors(a, b, self._scale(name), self._targets[name].experts, self._targets[name].transposed)

    def _shape_of(self, layer: str, side: str) -> list[int]:
        assert self._file is not None
        return self._file.shape(self._factor(layer, side))

    def _read(self, name: str) -> Tensor:
        assert self._file is not None
        return self._file.read(name).double()

    def _updated(self, layer: str, start: ExpectedTensor) -> ExpectedTensor:
        parts = self._parts[layer]
        a, b = (self._read(self._factor(layer, side)) for side in "AB")
        b = b * self._scale(layer)
        inputs_first = isinstance(self._modules.get(layer), Conv1D | nn.Embedding)
        if start.shape != ([a.shape[1], len(b)] if inputs_first else [len(b), a.shape[1]]):
            raise UserError(f"{layer} is {start.shape} and its adapter is for {len(b)} outputs of {a.shape[1]} inputs")

        def plain(first: int, last: int) -> Tensor:
            delta = (b @ a[:, first:last]).T if inputs_first else b[first:last] @ a
            return start.rows(first, last) + delta

        if self._config.get("use_dora"):
            magnitude = self._read(parts["magnitude_vector"])
            return ExpectedTensor(start.shape, _normed(plain, start.shape, magnitude, inputs_first=inputs_first))
        return ExpectedTensor(start.shape, plain)

    def _factor(self, layer: str, side: str) -> str:
        parts = self._parts[layer]
        return parts.get(side) or parts[f"embedding_{side}"]

    @property
    def scales(self) -> dict[str, float]:
        return {layer: self._scale(layer) for layer in self._parts}

    def _scale(self, layer: str) -> float:
        rank = self._shape_of(layer, "A")[0]
        rank = rank // self._targets[layer].experts if layer in self._targets else rank
        if rank not in (configured := self._configured("rank_pattern", layer, self._config["r"])):
            raise UserError(f"{layer} has rank {rank} in the adapter and {configured.pop():g} in its configuration")
        (alpha, *others) = self._configured("alpha_pattern", layer, self._config["lora_alpha"])
        if others:
            raise UserError(f"{layer} has more than one alpha in the adapter's configuration")
        return alpha / (rank**0.5 if self._config.get("use_rslora") else rank)

    def _configured(self, key: str, layer: str, default: float) -> set[float]:
        """Return the values of all patterns that match a layer: PEFT takes the first, and its file does not keep their order."""
        patterns = (self._config.get(key) or {}).items()
        return {float(value) for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", layer)} or {float(default)}


def _normed(plain: Rows, shape: list[int], magnitude: Tensor, *, inputs_first: bool) -> Rows:
    """Scale the weights of each output to the magnitude that DoRA learnt for it."""
    if not inputs_first:
        return lambda first, last: (block := plain(first, last)) * (magnitude[first:last] / block.norm(dim=1)).unsqueeze(1)
    squares = torch.zeros(shape[1], dtype=torch.float64)
    for span in spans(shape):
        squares += plain(*span).square().sum(0)
    return lambda first, last: plain(first, last) * (magnitude / squares.sqrt())
