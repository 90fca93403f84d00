"""Merge a LoRA adapter into its base: W = W_base + (alpha/r) B A, a block of rows at a time, never a second model.

Read from the base's safetensors, computed in float32, rounded once to the output dtype. Scaling comes from the adapter
itself. Covered: LoRA, rsLoRA, DoRA, rank and alpha patterns, biases, modules_to_save, Linear, Conv1D and embedding layers,
tied heads, grown vocabularies. Whatever else an adapter or its base holds is refused by name, and `check` says so before a
run's first step.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from halos.checkpoint.safefile import SHARD, Entry, SafeFile, blocks, spans, weight_files, write_sharded
from halos.errors import UserError
from halos.logps.vocabulary import fresh_rows

PREFIX = "base_model.model."
KEEP = "keep the adapter as it is with checkpoint.merge_lora=false"
COVERED = {  # what a LoraConfig may say; anything else must be as PEFT's default has it
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "runtime_config",
    "eva_config", "qalora_group_size", "megatron_core",
}  # fmt: skip
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights: the others change the base's own weights


# --- what is covered -------------------------------------------------------------------------------------------------


def refuse(config: PeftConfig) -> None:
    """Raises UserError for an adapter that is no LoRA, or a kind of LoRA that is not covered."""
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:  # AdaLoRA's is a LoraConfig
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(f"cannot merge: this is a {kind} adapter, and only LoRA is covered; {KEEP}")
    default = LoraConfig()
    for name in (each.name for each in fields(config)):
        value = getattr(config, name)
        if name == "init_lora_weights":
            known = value in STARTS
        else:
            known = name in COVERED or not value or value == getattr(default, name, None)
        if not known:
            raise UserError(f"cannot merge: {name}={value!r} is not covered; {KEEP}")


def check(base: Path, model: PeftModel) -> None:
    """Raises UserError where what is about to be trained could not be merged in the end."""
    config = model.peft_config["default"]
    refuse(config)
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    adapter = sort(get_peft_model_state_dict(model, save_embedding_layers=False))
    _fit(adapter, Source(base, inner))


# --- the adapter -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's tensors by what they do: names in its file, under the names of the layers and tensors of the model."""

    updates: dict[str, dict[str, str]] = field(default_factory=dict)  # layer -> {A, B, magnitude}
    replaced: dict[str, str] = field(default_factory=dict)  # tensor -> what stands in its place


def sort(names: Iterable[str]) -> Adapter:
    """Raises UserError for tensors that this module does not know how to merge."""
    found, unknown = Adapter(), []
    for name in names:
        bare = name.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_(?:embedding_)?(A|B|magnitude)(?:_vector)?(\.weight)?", bare):
            found.updates.setdefault(match[1], {})[match[2]] = name
        elif "lora_" in bare or "trainable_tokens" in bare:
            unknown.append(bare)
        else:
            found.replaced[unwrapped(bare)] = name
    unknown += [f"{layer} (incomplete)" for layer, parts in found.updates.items() if not {"A", "B"} <= parts.keys()]
    if unknown:
        raise UserError(f"cannot merge this adapter: {unknown[0]} is not covered; {KEEP}")
    return found


def unwrapped(name: str) -> str:
    """A tensor's name in the model without PEFT's wrappers."""
    for wrapper in (".base_layer.", ".original_module.", ".modules_to_save.default.", ".modules_to_save."):
        name = name.replace(wrapper, ".")
    return name


def scaling(config: LoraConfig, layer: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732); of alpha's patterns the first that ends the layer's name."""
    alpha: float = config.lora_alpha
    for pattern, value in (config.alpha_pattern or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to one layer's weight."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    magnitude: Tensor | None  # (out,), DoRA's
    scaling: float
    by_input: bool  # Conv1D and embeddings store (in, out)

    def added(self, block: Tensor, first: int) -> Tensor:
        last = first + len(block)
        left, right = (self.a[:, first:last].T, self.b.T) if self.by_input else (self.b[first:last], self.a)
        return torch.addmm(block.float(), left, right, alpha=self.scaling)

    def merged(self, weight: Sequence[tuple[int, int]], rows: Any) -> Iterator[Tensor]:
        """Blocks of the merged weight, from `rows(first, last)` of the base's. DoRA: eq. 5 of arXiv:2402.09353."""
        norms: Tensor | None = None
        if self.magnitude is not None and self.by_input:  # a norm runs over all inputs, and those are the rows
            squares = (self.added(rows(*span), span[0]).square().sum(0, dtype=torch.float64) for span in weight)
            norms = sum(squares, torch.zeros(())).sqrt().float()
        for span in weight:
            block = self.added(rows(*span), span[0])
            if self.magnitude is not None and norms is not None:
                block *= self.magnitude / norms
            elif self.magnitude is not None:
                block *= (self.magnitude[span[0] : span[1]] / block.norm(dim=1))[:, None]
            yield block


# --- the base --------------------------------------------------------------------------------------------------------


class Names:
    """How a file of the base spells what the model calls its tensors, by the rules that from_pretrained follows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.expected = {unwrapped(name): None for name in model.state_dict() if ".lora_" not in name}
        self._prefix = model.base_model_prefix
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def __call__(self, name: str) -> tuple[str | None, bool]:
        """The model's name for a tensor of the file, or None for one that it does not have (a dropped LM head); and whether
        loading fuses or splits the tensor, so that no single one stands for the model's."""
        mine, converted = rename_source_key(name, self._renamings, self._converters, self._prefix, self.expected)
        return (mine if mine in self.expected else None), converted is not None


class Source:
    """The base on disk under the names of the model. Raises UserError for one whose weights are quantised or pickled.

    `where` has the tensors that stand for one of the model's; `absent` is the half of a tied pair that the files leave out,
    with the other half.
    """

    def __init__(self, base: Path, model: PreTrainedModel) -> None:
        settings = json.loads((base / "config.json").read_text())
        if settings.get("quantization_config"):
            raise UserError(f"cannot merge: the weights of {base} are quantised on disk; give the model they were made from")
        self.path, names = base, Names(model)
        self.files = [SafeFile(path) for path in weight_files(base)]
        found = {name: (file, *names(name)) for file in self.files for name in file.names}
        self.tensors = {name: (file, mine) for name, (file, mine, _) in found.items() if mine is not None}
        self.dropped = sorted(name for name, (_, mine, _) in found.items() if mine is None)
        self.fused = {mine for _, mine, fused in found.values() if fused}
        self.where = {mine: (file, name) for name, (file, mine) in self.tensors.items() if mine not in self.fused}
        self.expected, self.kinds = names.expected, _layers(model)
        self.embedding, self.head = (
            _name_of(model, each) for each in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        pair = {each for each in (self.embedding, self.head) if each is not None}
        configs = (model.config, model.config.get_text_config())
        self.tied_by_config = any(getattr(each, "tie_word_embeddings", False) for each in configs)
        self.tied = len(pair) == 2 and self.tied_by_config
        lost = pair - self.where.keys()
        self.absent: tuple[str, str] | None = None
        if self.tied and len(lost) == 1:
            self.absent = (lost.pop(), (pair & self.where.keys()).pop())


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules by their names without PEFT's wrappers, each the innermost."""
    return {unwrapped(f"{name}.").removesuffix("."): module for name, module in model.named_modules() if ".lora_" not in name}


def _name_of(model: PreTrainedModel, layer: nn.Module | None) -> str | None:
    """The name of a layer's weight; of a layer that carries an adapter, the base's."""
    names = [name for name, module in model.named_modules() if module is layer]
    return unwrapped(f"{names[0]}.weight") if names else None


def _fit(adapter: Adapter, base: Source) -> None:
    """Raises UserError where the adapter changes what the base does not have as a tensor of its own."""
    own = {*base.where, *(base.absent or ())}
    for layer in adapter.updates:
        name = f"{layer}.weight"
        if name in base.fused:
            raise UserError(f"cannot merge: {name} is fused with others when it is loaded, which is not covered; {KEEP}")
        if name not in own:
            raise UserError(f"cannot merge: the adapter changes {layer}, which {base.path} does not have")
        if not isinstance(base.kinds.get(layer), nn.Linear | Conv1D | nn.Embedding):
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

    def entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """Every tensor of the merged model in the base's order, under the base's names."""
        found = {name: self._entry(mine, file, name, dtype) for name, (file, mine) in self.base.tensors.items()}
        if self.base.absent and self.unties:
            mine, twin = self.base.absent
            found[mine] = self._entry(mine, *self.base.where[twin], dtype)
        for name in self.added:
            found[name] = self._whole(self.sorted.replaced[name], dtype)
        return found

    @property
    def unties(self) -> bool:
        """A tied head stays one only where neither it nor the embedding was trained: PEFT trains the two apart."""
        touched = {f"{layer}.weight" for layer in self.sorted.updates} | self.sorted.replaced.keys()
        return self.base.tied and not touched.isdisjoint({self.base.head, self.base.embedding})

    @property
    def added(self) -> list[str]:
        return sorted(self.sorted.replaced.keys() - self.base.where.keys() - {*(self.base.absent or ())})

    def _entry(self, mine: str, file: SafeFile, name: str, dtype: torch.dtype) -> Entry:
        if mine in self.sorted.replaced:
            return self._whole(self.sorted.replaced[mine], dtype, like=(mine, file.shape(name)))
        kind, shape = file.dtype(name), file.shape(name)
        layer, fresh = mine.removesuffix(".weight"), []
        if mine in (self.base.embedding, self.base.head):
            fresh = fresh_rows(shape[0], self.vocabulary, self.tokens)
            shape = [max(shape[0], self.vocabulary), *shape[1:]]
        kind = dtype if kind.is_floating_point else kind
        if layer in self.sorted.updates and mine != layer:
            self._refuse_other_shape(layer, shape)
            return Entry(kind, shape, lambda: self._update(layer).merged(spans(shape), _rows(file, name, fresh)))
        if not fresh:
            return Entry(kind, shape, partial(blocks, file, name))
        return Entry(kind, shape, lambda: (_rows(file, name, fresh)(*span) for span in spans(shape)))

    def _whole(self, name: str, dtype: torch.dtype, like: tuple[str, list[int]] | None = None) -> Entry:
        shape = self.adapter.shape(name)
        if like is not None:
            mine, wanted = like
            if mine in (self.base.embedding, self.base.head):
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
        return isinstance(self.base.kinds[layer], Conv1D | nn.Embedding)

    def _update(self, layer: str) -> Update:
        parts = {name: self.adapter.read(key).float() for name, key in self.sorted.updates[layer].items()}
        factor = scaling(self.config, layer, len(parts["A"]))
        return Update(parts["A"], parts["B"], parts.get("magnitude"), factor, self._by_input(layer))


def _rows(file: SafeFile, name: str, fresh: Sequence[int]) -> Any:
    """rows(first, last) of a tensor of the base, in which the rows `fresh` are the mean of those before them."""
    if not fresh:
        return partial(file.rows, name)
    known = file.shape(name)[0]
    old = min(known, *fresh)
    sums = (file.rows(name, *span).double().sum(0) for span in spans([old, *file.shape(name)[1:]]))
    mean = (sum(sums, torch.zeros(())) / old).float()

    def rows(first: int, last: int) -> Tensor:
        result = torch.empty(last - first, *file.shape(name)[1:])
        if first < known:
            result[: min(known, last) - first] = file.rows(name, first, min(known, last)).float()
        result[[row - first for row in fresh if first <= row < last]] = mean
        return result

    return rows


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
    settings = PeftConfig.from_pretrained(str(adapter))
    refuse(settings)
    assert isinstance(settings, LoraConfig)
    delta = SafeFile(adapter / "adapter_model.safetensors")
    todo = Merge(delta, settings, sort(delta.names), Source(base, model), vocabulary, tokens)
    _fit(todo.sorted, todo.base)
    entries = todo.entries(dtype)
    config = type(model.config).from_dict(model.config.to_dict())
    config.__dict__.pop("quantization_config", None)  # trained on a quantised copy; these are the weights it was made from
    config.architectures, config.dtype = [type(model).__name__], dtype
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, vocabulary)
    if todo.unties:
        config.tie_word_embeddings = text.tie_word_embeddings = False
    write_sharded(output, entries, shard)
    config.save_pretrained(output)
    present = set(todo.base.where)
    facts = {"merged": len(todo.sorted.updates), "replaced": sorted(todo.sorted.replaced.keys() & present), "added": todo.added,
             "untied": todo.unties, "dropped": todo.base.dropped, "vocabulary": text.vocab_size}  # fmt: skip
    if getattr(model, "is_quantized", False):
        facts["note"] = "trained on a quantised copy of the base and merged into the base's own weights, as the proof compares"
    return facts
