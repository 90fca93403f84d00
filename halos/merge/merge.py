"""Merge a LoRA adapter into its base: W = W_base + (alpha/r) B A, a block of rows at a time, never a second model.

Read from the base's safetensors, computed in float64, rounded once to the output dtype. Scaling comes from the adapter
itself. Covered: LoRA, rsLoRA, DoRA, rank and alpha patterns, biases, modules_to_save, Linear, Conv1D and embedding layers,
the experts of mixtures and other parameters, tied heads, grown vocabularies. Whatever else an adapter or its base holds is
refused by name, which `halos/merge/rehearsal.py` does before a run's first step.
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
from halos.merge.base_weights import Source
from halos.merge.experts import Stack, is_transposed, parameters_of
from halos.merge.lora import KEEP, Adapter, Update, refuse, scaling, sort, value_of
from halos.merge.safetensors_io import SHARD, Entry, SafeFile, blocks, spans, write_sharded


def trained_by(model: PeftModel) -> Adapter:
    """What is about to be trained, by the names that its file would have."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return sort(state, parameters_of(model.get_base_model(), config.target_parameters or ()))


def _fit(adapter: Adapter, base: Source) -> None:
    """Raises UserError where the adapter changes what the base does not have as a tensor of its own."""
    own = {*base.where, *(base.absent or ())}
    for layer in adapter.updates:
        name = layer if layer in base.expected else f"{layer}.weight"
        if name == layer and name in base.stacked:
            continue
        if name in base.fused:
            raise UserError(f"cannot merge: {name} is fused with others when it is loaded, which is not covered; {KEEP}")
        if name not in own:
            raise UserError(f"cannot merge: the adapter changes {layer}, which {base.path} does not have")
        if name != layer and not isinstance(base.kinds.get(layer), nn.Linear | Conv1D | nn.Embedding):
            raise UserError(f"cannot merge: {layer} is a {type(base.kinds.get(layer)).__name__}, which is not covered; {KEEP}")
    for name in adapter.replaced:
        if name in base.fused:
            raise UserError(f"cannot merge: {name} is fused with others when it is loaded, which is not covered; {KEEP}")
        if name not in base.expected:
            raise UserError(f"cannot merge: {name} of the adapter belongs nowhere in {base.path}")


# --- the merge -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Merge:
    """All that is merged: the adapter, its base, and the vocabulary that the trained model had."""

    adapter: SafeFile
    config: LoraConfig
    sorted: Adapter
    base: Source
    vocabulary: int
    tokens: Sequence[int]  # that were new to the base
    stacks: dict[str, Stack] = field(default_factory=dict)  # as many as are in use

    def entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """Every tensor of the merged model in the base's order, under the base's names."""
        for layer in self.sorted.updates.keys() & self.base.stacked:
            self._refuse_other_size(layer)
        found = {name: self._entry(mine, file, name, dtype) for name, (file, mine) in self.base.tensors.items()}
        if self.base.absent and self.unties:
            mine, twin = self.base.absent
            found[mine] = self._entry(mine, *self.base.where[twin], dtype)
        for name in self.added:
            found[name] = self._whole(self.sorted.replaced[name], self.base.dtype_of(name, dtype))
        return found

    @property
    def unties(self) -> bool:
        """A tied head stays one only where neither it nor the embedding was trained: PEFT trains the two apart. And where the
        files hold two different tables, no model was ever tied, whatever its configuration says."""
        touched = {f"{layer}.weight" for layer in self.sorted.updates} | self.sorted.replaced.keys()
        return self.base.diverged or (self.base.tied and not touched.isdisjoint({self.base.head, self.base.embedding}))

    @property
    def added(self) -> list[str]:
        return sorted(self.sorted.replaced.keys() - self.base.where.keys() - {*(self.base.absent or ())})

    def config_of(self, model: PreTrainedModel, dtype: torch.dtype) -> PretrainedConfig:
        config = type(model.config).from_dict(model.config.to_dict())
        config.__dict__.pop("quantization_config", None)  # trained on a quantised copy; these are the weights it was made from
        config.architectures, config.dtype = [type(model).__name__], dtype
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, self.vocabulary)
        if self.unties:
            config.tie_word_embeddings = text.tie_word_embeddings = False
        return config

    def _entry(self, mine: str, file: SafeFile, name: str, dtype: torch.dtype) -> Entry:
        dtype = self.base.dtype_of(mine, dtype)
        if mine in self.sorted.replaced:
            return self._whole(self.sorted.replaced[mine], dtype, like=(mine, file.shape(name)))
        kind, shape = file.dtype(name), file.shape(name)
        layer, fresh = mine if mine in self.sorted.updates else mine.removesuffix(".weight"), []
        if layer in self.sorted.updates and layer in self.base.stacked:
            piece = self.base.pieces.get(name)
            return Entry(dtype, shape, lambda: self._stack(layer).merged(file, name, piece))
        if mine in self.base.tables:
            fresh = fresh_rows(shape[0], self.vocabulary, self.tokens)
            shape = [max(shape[0], self.vocabulary), *shape[1:]]
        kind = dtype if kind.is_floating_point else kind
        if layer in self.sorted.updates and (mine != layer or len(shape) == 2):
            self._refuse_other_shape(layer, shape)
            return Entry(kind, shape, lambda: self._update(layer).merged(spans(shape), _rows(file, name, fresh)))
        if not fresh:
            return Entry(kind, shape, partial(blocks, file, name))
        return Entry(kind, shape, lambda: starmap(_rows(file, name, fresh), spans(shape)))

    def _whole(self, name: str, dtype: torch.dtype, like: tuple[str, list[int]] | None = None) -> Entry:
        shape = self.adapter.shape(name)
        if like is not None:
            mine, wanted = like
            if mine in self.base.tables:
                wanted = [max(wanted[0], self.vocabulary), *wanted[1:]]
            if shape != wanted:
                raise UserError(f"cannot merge: {mine} is {shape} in the adapter and {wanted} in {self.base.path}")
        kind = self.adapter.dtype(name)
        return Entry(dtype if kind.is_floating_point else kind, shape, partial(blocks, self.adapter, name))

    def _refuse_other_shape(self, layer: str, shape: list[int]) -> None:
        parts = self.sorted.updates[layer]
        wanted = [self.adapter.shape(parts["B"])[0], self.adapter.shape(parts["A"])[1]]
        wanted = wanted[::-1] if self._by_input(layer) else wanted
        if wanted != shape:
            raise UserError(f"cannot merge: {layer} is {wanted} for the adapter and {shape} in {self.base.path}")

    def _by_input(self, layer: str) -> bool:
        owner = self.base.kinds.get(layer.rpartition(".")[0])
        return isinstance(self.base.kinds.get(layer), Conv1D | nn.Embedding) or is_transposed(owner)

    def _stack(self, layer: str) -> Stack:
        """Made once for the tensors of a layer's experts, which follow each other; two at a time, for both of a layer's."""
        if layer not in self.stacks:
            while len(self.stacks) > 1:
                self.stacks.pop(next(iter(self.stacks)))
            self.stacks[layer] = self._read(layer)
        return self.stacks[layer]

    def _read(self, layer: str) -> Stack:
        parts, count = self.sorted.updates[layer], self.base.stacked[layer][0]
        factor = scaling(self.config, layer, self.adapter.shape(parts["A"])[0] // count)
        return Stack(self.adapter, parts["A"], self.adapter.read(parts["B"]), count, factor, self._by_input(layer))

    def _refuse_other_size(self, layer: str) -> None:
        a, b = (self.adapter.shape(self.sorted.updates[layer][side]) for side in "AB")
        count, *wanted = self.base.stacked[layer]
        wanted = wanted[::-1] if self._by_input(layer) else wanted
        rank = int(value_of(self.config.rank_pattern, layer, self.config.r, "rank_pattern"))
        if a[0] != count * rank or a[0] != b[1] or [b[0], a[1]] != wanted:
            raise UserError(
                f"cannot merge: {layer} has {count} experts of {wanted}, and its adapter of rank {rank} is {b} by {a}"
            )

    def _update(self, layer: str) -> Update:
        parts = {name: self.adapter.read(key).double() for name, key in self.sorted.updates[layer].items()}
        factor = scaling(self.config, layer, len(parts["A"]))
        return Update(parts["A"], parts["B"], parts.get("magnitude"), factor, self._by_input(layer))


def _rows(file: SafeFile, name: str, fresh: Sequence[int]) -> Any:
    """rows(first, last) of a tensor of the base, in which the rows `fresh` are the mean of those before them."""
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
    """What there is to do; of base and adapter names and shapes are read. Raises UserError where one does not fit the other."""
    settings = PeftConfig.from_pretrained(str(adapter))
    refuse(settings)
    assert isinstance(settings, LoraConfig)
    delta = SafeFile(adapter / "adapter_model.safetensors")
    named = parameters_of(model, settings.target_parameters or ())
    todo = Merge(delta, settings, sort(delta.names, named), Source(base, model), vocabulary, tokens)
    _fit(todo.sorted, todo.base)
    return todo


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
    """Write merged safetensors and config.json into `output`; what was done, for the report.

    `model` (its layers may carry the adapter, or lie on the meta device) says what the tensors are called; none of its
    weights is read. `vocabulary` is how many ids the trained model had, where they are more than the base's, and `tokens`
    those that were new. Raises UserError, before a byte is written, where the adapter does not fit the base.
    """
    todo = plan(base, adapter, model, vocabulary, tokens)
    entries, config = todo.entries(dtype), todo.config_of(model, dtype)
    write_sharded(output, entries, shard)
    config.save_pretrained(output)
    present = set(todo.base.where)
    facts = {"merged": len(todo.sorted.updates), "replaced": sorted(todo.sorted.replaced.keys() & present), "added": todo.added,
             "untied": todo.unties, "dropped": todo.base.dropped, "vocabulary": config.get_text_config().vocab_size}  # fmt: skip
    if getattr(model, "is_quantized", False):
        facts["note"] = "trained on a quantised copy of the base and merged into the base's own weights, as the proof compares"
    return facts
