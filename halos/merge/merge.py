"""Merge a LoRA adapter into its base: W = W_base + (alpha/r) B A, a block of rows at a time, never a second model.

Read from the base's safetensors, computed in float64, rounded once to the output dtype. Scaling comes from the adapter
itself. Covered: LoRA, rsLoRA, DoRA, rank and alpha patterns, biases, modules_to_save, Linear, Conv1D and embedding layers,
the experts of mixtures and other parameters, tied heads, grown vocabularies. Anything else is refused by name, before a run's
first step (`halos/merge/preflight.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halos.errors import UserError
from halos.logps.vocabulary import fresh_rows
from halos.merge.base_weights import BaseWeights
from halos.merge.experts import ExpertUpdates, is_transposed, parameters_of
from halos.merge.lora import KEEP, AdapterTensors, Update, classify, refuse_uncovered, scaling, value_of
from halos.merge.safetensors_io import SHARD, Entry, SafeFile, blocks, spans, write_sharded


def trained_tensors(model: PeftModel) -> AdapterTensors:
    """Return the tensors that a model trains, by the names that its adapter's file would have."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return classify(state, parameters_of(model.get_base_model(), config.target_parameters or ()))


def _refuse_misfit(adapter: AdapterTensors, base: BaseWeights) -> None:
    """Raises UserError where the adapter changes something that is not a tensor of the base's."""
    own = {*base.locations, *(base.absent or ())}
    for layer in adapter.updates:
        name = layer if layer in base.expected else f"{layer}.weight"
        if name == layer and name in base.stacked:
            continue
        if name in base.fused:
            raise UserError(f"cannot merge: {name} is fused with others when it is loaded, which is not covered; {KEEP}")
        if name not in own:
            raise UserError(f"cannot merge: the adapter changes {layer}, which {base.path} does not have")
        if name != layer and not isinstance(base.modules.get(layer), nn.Linear | Conv1D | nn.Embedding):
            raise UserError(f"cannot merge: {layer} is a {type(base.modules.get(layer)).__name__}, which is not covered; {KEEP}")
    for name in adapter.replaced:
        if name in base.fused:
            raise UserError(f"cannot merge: {name} is fused with others when it is loaded, which is not covered; {KEEP}")
        if name not in base.expected:
            raise UserError(f"cannot merge: {name} of the adapter is no tensor of {base.path}")


# --- the merge -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Merge:
    """The inputs of a merge: the adapter, its base, and the vocabulary of the trained model."""

    adapter: SafeFile
    config: LoraConfig
    changes: AdapterTensors
    base: BaseWeights
    vocabulary: int
    tokens: Sequence[int]  # ids that were new to the base
    cache: dict[str, ExpertUpdates] = field(default_factory=dict)  # a cache of the stacked parameters in use

    def entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """Return every tensor of the merged model in the order and under the names of the base's files."""
        for layer in self.changes.updates.keys() & self.base.stacked:
            self._refuse_other_size(layer)
        entries = {name: self._entry(in_model, file, name, dtype) for name, (file, in_model) in self.base.tensors.items()}
        if self.base.absent and self.unties:
            absent, tied_to = self.base.absent
            entries[absent] = self._entry(absent, *self.base.locations[tied_to], dtype)
        for name in self.added:
            entries[name] = self._replaced(self.changes.replaced[name], self.base.dtype_of(name, dtype))
        return entries

    @property
    def unties(self) -> bool:
        """Whether head and embedding are untied, because one of them was trained (PEFT trains them separately), or because the
        files hold two different tables, which loading does not tie whatever the configuration says."""
        touched = {f"{layer}.weight" for layer in self.changes.updates} | self.changes.replaced.keys()
        return self.base.diverged or (self.base.tied and not touched.isdisjoint({self.base.head, self.base.embedding}))

    @property
    def added(self) -> list[str]:
        return sorted(self.changes.replaced.keys() - self.base.locations.keys() - {*(self.base.absent or ())})

    def config_of(self, model: PreTrainedModel, dtype: torch.dtype) -> PretrainedConfig:
        config = type(model.config).from_dict(model.config.to_dict())
        config.__dict__.pop("quantization_config", None)  # training used a quantised copy of these weights
        config.architectures, config.dtype = [type(model).__name__], dtype
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, self.vocabulary)
        if self.unties:
            config.tie_word_embeddings = text.tie_word_embeddings = False
        return config

    def _entry(self, in_model: str, file: SafeFile, name: str, dtype: torch.dtype) -> Entry:
        dtype = self.base.dtype_of(in_model, dtype)
        if in_model in self.changes.replaced:
            return self._replaced(self.changes.replaced[in_model], dtype, like=(in_model, file.shape(name)))
        kind, shape = file.dtype(name), file.shape(name)
        layer, fresh = in_model if in_model in self.changes.updates else in_model.removesuffix(".weight"), []
        if layer in self.changes.updates and layer in self.base.stacked:
            part = self.base.slices.get(name)
            return Entry(dtype, shape, lambda: self._experts(layer).merged(file, name, part))
        if in_model in self.base.tables:
            fresh = fresh_rows(shape[0], self.vocabulary, self.tokens)
            shape = [max(shape[0], self.vocabulary), *shape[1:]]
        kind = dtype if kind.is_floating_point else kind
        if layer in self.changes.updates and (in_model != layer or len(shape) == 2):
            self._refuse_other_shape(layer, shape)
            return Entry(kind, shape, lambda: self._update(layer).merged(spans(shape), _rows(file, name, fresh)))
        if not fresh:
            return Entry(kind, shape, partial(blocks, file, name))
        return Entry(kind, shape, lambda: starmap(_rows(file, name, fresh), spans(shape)))

    def _replaced(self, name: str, dtype: torch.dtype, like: tuple[str, list[int]] | None = None) -> Entry:
        shape = self.adapter.shape(name)
        if like is not None:
            in_model, base_shape = like
            if in_model in self.base.tables:
                base_shape = [max(base_shape[0], self.vocabulary), *base_shape[1:]]
            if shape != base_shape:
                raise UserError(f"cannot merge: {in_model} is {shape} in the adapter and {base_shape} in {self.base.path}")
        kind = self.adapter.dtype(name)
        return Entry(dtype if kind.is_floating_point else kind, shape, partial(blocks, self.adapter, name))

    def _refuse_other_shape(self, layer: str, shape: list[int]) -> None:
        parts = self.changes.updates[layer]
        own = [self.adapter.shape(parts["B"])[0], self.adapter.shape(parts["A"])[1]]
        own = own[::-1] if self._is_transposed(layer) else own
        if own != shape:
            raise UserError(f"cannot merge: {layer} is {own} for the adapter and {shape} in {self.base.path}")

    def _is_transposed(self, layer: str) -> bool:
        owner = self.base.modules.get(layer.rpartition(".")[0])
        return isinstance(self.base.modules.get(layer), Conv1D | nn.Embedding) or is_transposed(owner)

    def _experts(self, layer: str) -> ExpertUpdates:
        """Return a stacked parameter's updates, cached while its experts are written; two at a time, for both of a layer."""
        if layer not in self.cache:
            while len(self.cache) > 1:
                self.cache.pop(next(iter(self.cache)))
            self.cache[layer] = self._read(layer)
        return self.cache[layer]

    def _read(self, layer: str) -> ExpertUpdates:
        parts, count = self.changes.updates[layer], self.base.stacked[layer][0]
        factor = scaling(self.config, layer, self.adapter.shape(parts["A"])[0] // count)
        return ExpertUpdates(self.adapter, parts["A"], self.adapter.read(parts["B"]), count, factor, self._is_transposed(layer))

    def _refuse_other_size(self, layer: str) -> None:
        a, b = (self.adapter.shape(self.changes.updates[layer][side]) for side in "AB")
        count, *matrix = self.base.stacked[layer]
        matrix = matrix[::-1] if self._is_transposed(layer) else matrix
        rank = int(value_of(self.config.rank_pattern, layer, self.config.r, "rank_pattern"))
        if a[0] != count * rank or a[0] != b[1] or [b[0], a[1]] != matrix:
            raise UserError(
                f"cannot merge: {layer} has {count} experts of {matrix}, and its adapter of rank {rank} is {b} by {a}"
            )

    def _update(self, layer: str) -> Update:
        parts = {name: self.adapter.read(key).double() for name, key in self.changes.updates[layer].items()}
        factor = scaling(self.config, layer, len(parts["A"]))
        return Update(parts["A"], parts["B"], parts.get("magnitude"), factor, self._is_transposed(layer))


def _rows(file: SafeFile, name: str, fresh: Sequence[int]) -> Any:
    """Return rows(first, last) of a tensor of the base, with the rows `fresh` set to the mean of the rows before them."""
    if not fresh:
        return partial(file.rows, name)
    known = file.shape(name)[0]
    old = min(known, *fresh)
    sums = (file.rows(name, *span).double().sum(0) for span in spans([old, *file.shape(name)[1:]]))
    mean = sum(sums, torch.zeros((), dtype=torch.float64)) / old

    def rows(first: int, last: int) -> Tensor:
        result = torch.empty(last - first, *file.shape(name)[1:], dtype=torch.float64)
        if first < known:
            result[: min(known, last) - first] = file.rows(name, first, min(known, last)).double()
        result[[row - first for row in fresh if first <= row < last]] = mean
        return result

    return rows


def plan(base: Path, adapter: Path, model: PreTrainedModel, vocabulary: int, tokens: Sequence[int]) -> Merge:
    """Prepare a merge from the names and shapes of base and adapter. Raises UserError where they do not fit."""
    settings = PeftConfig.from_pretrained(str(adapter))
    refuse_uncovered(settings)
    assert isinstance(settings, LoraConfig)
    delta = SafeFile(adapter / "adapter_model.safetensors")
    parameters = parameters_of(model, settings.target_parameters or ())
    planned = Merge(delta, settings, classify(delta.names, parameters), BaseWeights(base, model), vocabulary, tokens)
    _refuse_misfit(planned.changes, planned.base)
    return planned


def merge(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    model: PreTrainedModel,
    dtype: torch.dtype,
    vocabulary: int = 0,
    tokens: Sequence[int] = (),
    shard: int = SHARD,
) -> dict[str, Any]:
    """Write merged safetensors and config.json into `output`; return facts for the report.

    `model` (which may carry the adapter, or be on the meta device) gives the names of the tensors; its weights are not read.
    `vocabulary` is the number of ids of the trained model, where they are more than the base's, and `tokens` those that were
    new. Raises UserError, before a byte is written, where the adapter does not fit the base.
    """
    planned = plan(base, adapter, model, vocabulary, tokens)
    entries, config = planned.entries(dtype), planned.config_of(model, dtype)
    write_sharded(output, entries, shard)
    config.save_pretrained(output)
    present = set(planned.base.locations)
    facts = {"merged": len(planned.changes.updates), "replaced": sorted(planned.changes.replaced.keys() & present),
             "added": planned.added, "untied": planned.unties, "dropped": planned.base.dropped,
             "vocabulary": config.get_text_config().vocab_size}  # fmt: skip
    if getattr(model, "is_quantized", False):
        facts["note"] = "trained on a quantised copy of the base and merged into the base's own weights, as the proof compares"
    return facts
