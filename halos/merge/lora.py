"""LoRA adapters: which kinds can be merged, their patterns and scaling, and the update of a layer."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from halos.errors import UserError
from halos.merge.base_weights import unwrapped

PREFIX = "base_model.model."
KEEP = "keep the adapter as it is with checkpoint.merge_lora=false"
COVERED = {  # fields of a LoraConfig that may have any value; the others must have PEFT's default
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "runtime_config",
    "eva_config", "qalora_group_size", "megatron_core", "target_parameters",
}  # fmt: skip
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights; the others change the base's own weights


def refuse_uncovered(config: PeftConfig) -> None:
    """Raises UserError for an adapter that is not LoRA, or a kind of LoRA that cannot be merged."""
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:  # AdaLoRA's config is a LoraConfig
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(f"cannot merge: this is a {kind} adapter, and only LoRA is covered; {KEEP}")
    default = LoraConfig()
    for name in (each.name for each in fields(config)):
        value = getattr(config, name)
        if name == "init_lora_weights":
            covered = value in STARTS
        else:
            covered = name in COVERED or not value or value == getattr(default, name, None)
        if not covered:
            raise UserError(f"cannot merge: {name}={value!r} is not covered; {KEEP}")


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    """The names of an adapter's tensors in its file, by the layer or tensor of the model that they change."""

    updates: dict[str, dict[str, str]] = field(default_factory=dict)  # layer or parameter -> {A, B, magnitude}
    replaced: dict[str, str] = field(default_factory=dict)  # tensor -> the one that replaces it


def classify(names: Iterable[str], parameters: Mapping[str, str]) -> AdapterTensors:
    """Sort an adapter's tensors by what they change; `parameters` maps paths of factors to target parameters. Raises UserError
    for tensors that cannot be merged."""
    tensors, unknown = AdapterTensors(), []
    for name in names:
        bare = name.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_(?:embedding_)?(A|B|magnitude)(?:_vector)?(\.weight)?", bare):
            tensors.updates.setdefault(parameters.get(match[1], match[1]), {})[match[2]] = name
        elif "lora_" in bare or "trainable_tokens" in bare:
            unknown.append(bare)
        elif ".original_module." not in bare:  # with biases, PEFT also saves that of a layer's untrained copy
            tensors.replaced[unwrapped(bare)] = name
    unknown += [f"{layer} (incomplete)" for layer, parts in tensors.updates.items() if not {"A", "B"} <= parts.keys()]
    if unknown:
        raise UserError(f"cannot merge this adapter: {unknown[0]} is not covered; {KEEP}")
    return tensors


# --- patterns


PATTERNS = ("rank_pattern", "alpha_pattern")


def refuse_unmatched_patterns(model: PeftModel, settings: Mapping[str, Any]) -> None:
    """Raises UserError for a pattern that matches no layer."""
    layers = layers_of(model)
    for key in PATTERNS:
        for pattern in settings[key] or {}:  # PEFT names a layer that it adapts by its weight after the weight
            if not any(_matches(pattern, layer) or _matches(rf"({pattern})\.weight", layer) for layer in layers):
                raise UserError(f"peft.{key}: '{pattern}' matches none of the {len(layers)} layers that have an adapter")


def pin_patterns(model: PeftModel) -> None:
    """Write each layer's rank and alpha into the configuration, under the layer's full name.

    PEFT takes the first pattern that matches the end of a layer's name, and saves patterns in another order than it was given:
    a layer that trained with one scale would be loaded with another.
    """
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    layers = layers_of(model)
    if config.rank_pattern:
        ranks = {layer: module.r["default"] for layer, module in layers.items()}
        config.rank_pattern = {exact(layer): rank for layer, rank in ranks.items() if rank != config.r}
    if config.alpha_pattern:
        alphas = {layer: module.lora_alpha["default"] for layer, module in layers.items()}
        config.alpha_pattern = {exact(layer): alpha for layer, alpha in alphas.items() if alpha != config.lora_alpha}


def layers_of(model: PeftModel) -> dict[str, LoraLayer]:
    """Return the layers with an adapter by the names that patterns match: the weight's, if PEFT adapts a layer by its weight."""
    layers: dict[str, LoraLayer] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            layers[unwrapped(f"{name}.{module.parameter_name}")] = module
        elif isinstance(module, LoraLayer):
            layers[name] = module
    return layers


def exact(layer: str) -> str:
    """Return a pattern that matches this layer and no other, as PEFT matches patterns."""
    return "^" + re.escape(layer)


def _matches(pattern: str, layer: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", layer) is not None
    except re.error as error:
        raise UserError(f"'{pattern}' is no pattern for the names of layers: {error}") from error


def value_of(patterns: Mapping[str, float] | None, layer: str, default: float, key: str) -> float:
    """Return the value that `patterns` set for a layer. Raises UserError where that depends on their order, which may differ
    between training and the file."""
    values = {float(value) for pattern, value in (patterns or {}).items() if _matches(pattern, layer)}
    if len(values) > 1:
        raise UserError(
            f"several patterns of {key} match {layer}, with values {', '.join(f'{value:g}' for value in sorted(values))}: the"
            " file does not say which of them training used. Give each layer one pattern"
        )
    return values.pop() if values else default


def scaling(config: LoraConfig, layer: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
    alpha = value_of(config.alpha_pattern, layer, config.lora_alpha, "alpha_pattern")
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def scales_of(model: PeftModel) -> dict[str, float]:
    """Return the factor by which each layer of the model multiplies its update."""
    return {name: float(module.scaling["default"]) for name, module in layers_of(model).items()}


# --- the update


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to a layer's weight, in float64: the merged weight is rounded once, when it is written."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    magnitude: Tensor | None  # (out,), DoRA's
    scaling: float
    transposed: bool  # Conv1D and embeddings store (in, out)

    def added(self, block: Tensor, first: int) -> Tensor:
        last = first + len(block)
        left, right = (self.a[:, first:last].T, self.b.T) if self.transposed else (self.b[first:last], self.a)
        return torch.addmm(block.double(), left, right, alpha=self.scaling)

    def merged(self, spans: Sequence[tuple[int, int]], rows: Any) -> Iterator[Tensor]:
        """Yield blocks of the merged weight in float64. `rows(first, last)` are the base's. DoRA: eq. 5 of arXiv:2402.09353."""
        norms: Tensor | None = None
        if self.magnitude is not None and self.transposed:  # the norm of an output runs over all inputs, which here are the rows
            squares = (self.added(rows(*span), span[0]).square().sum(0) for span in spans)
            norms = sum(squares, torch.zeros(())).sqrt()
        for span in spans:
            block = self.added(rows(*span), span[0])
            if self.magnitude is not None and norms is not None:
                block *= self.magnitude / norms
            elif self.magnitude is not None:
                block *= (self.magnitude[span[0] : span[1]] / block.norm(dim=1))[:, None]
            yield block
