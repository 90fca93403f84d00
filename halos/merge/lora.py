"""What a LoRA adapter does to its base, and which kinds of LoRA this code knows how to merge."""

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
COVERED = {  # what a LoraConfig may say; anything else must be as PEFT's default has it
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "runtime_config",
    "eva_config", "qalora_group_size", "megatron_core", "target_parameters",
}  # fmt: skip
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights: the others change the base's own weights


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


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's tensors by what they do: names in its file, under the names of the layers and tensors of the model."""

    updates: dict[str, dict[str, str]] = field(default_factory=dict)  # layer, or parameter -> {A, B, magnitude}
    replaced: dict[str, str] = field(default_factory=dict)  # tensor -> what stands in its place


def sort(names: Iterable[str], parameters: Mapping[str, str]) -> Adapter:
    """What the tensors do, those at the paths of `parameters` to them instead of to a layer. Raises UserError for tensors that
    this module does not know how to merge."""
    found, unknown = Adapter(), []
    for name in names:
        bare = name.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_(?:embedding_)?(A|B|magnitude)(?:_vector)?(\.weight)?", bare):
            found.updates.setdefault(parameters.get(match[1], match[1]), {})[match[2]] = name
        elif "lora_" in bare or "trainable_tokens" in bare:
            unknown.append(bare)
        elif ".original_module." not in bare:  # with every bias PEFT saves that of a layer's untrained twin too
            found.replaced[unwrapped(bare)] = name
    unknown += [f"{layer} (incomplete)" for layer, parts in found.updates.items() if not {"A", "B"} <= parts.keys()]
    if unknown:
        raise UserError(f"cannot merge this adapter: {unknown[0]} is not covered; {KEEP}")
    return found


# --- patterns


PATTERNS = ("rank_pattern", "alpha_pattern")


def refuse_idle_patterns(model: PeftModel, settings: Mapping[str, Any]) -> None:
    """Raises UserError for a pattern that fits no layer."""
    layers = layers_of(model)
    for key in PATTERNS:
        for pattern in settings[key] or {}:  # a layer that PEFT adapts by its weight bears that one's name
            if not any(_fits(pattern, layer) or _fits(rf"({pattern})\.weight", layer) for layer in layers):
                raise UserError(f"peft.{key}: '{pattern}' fits none of the {len(layers)} layers that have an adapter")


def say_exactly(model: PeftModel) -> None:
    """Write each layer's own rank and alpha into the configuration, under its whole name.

    PEFT takes the first pattern that ends a layer's name, and saves patterns in another order than it was given them: what
    trained with one scale would be read with another.
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
    """The layers that carry an adapter, by the names that patterns are matched with: of one by its weight, the weight's."""
    found: dict[str, LoraLayer] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            found[unwrapped(f"{name}.{module.parameter_name}")] = module
        elif isinstance(module, LoraLayer):
            found[name] = module
    return found


def exact(layer: str) -> str:
    """A pattern that fits this layer and no other, for whoever reads patterns as PEFT does."""
    return "^" + re.escape(layer)


def _fits(pattern: str, layer: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", layer) is not None
    except re.error as error:
        raise UserError(f"'{pattern}' is no pattern for the names of layers: {error}") from error


def value_of(patterns: Mapping[str, float] | None, layer: str, default: float, what: str) -> float:
    """What `patterns` say of a layer. Raises UserError where it depends on their order: the file's need not be the one that
    was trained with."""
    values = {float(value) for pattern, value in (patterns or {}).items() if _fits(pattern, layer)}
    if len(values) > 1:
        raise UserError(
            f"several patterns of {what} fit {layer} and say {', '.join(f'{value:g}' for value in sorted(values))}: which of them"
            " training took cannot be told from the file. Give each layer one pattern"
        )
    return values.pop() if values else default


def scaling(config: LoraConfig, layer: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
    alpha = value_of(config.alpha_pattern, layer, config.lora_alpha, "alpha_pattern")
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def scales_of(model: PeftModel) -> dict[str, float]:
    """What the layers themselves multiply their updates by."""
    return {name: float(module.scaling["default"]) for name, module in layers_of(model).items()}


# --- the update


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to one layer's weight, in float64: what is written is then rounded once."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    magnitude: Tensor | None  # (out,), DoRA's
    scaling: float
    by_input: bool  # Conv1D and embeddings store (in, out)

    def added(self, block: Tensor, first: int) -> Tensor:
        last = first + len(block)
        left, right = (self.a[:, first:last].T, self.b.T) if self.by_input else (self.b[first:last], self.a)
        return torch.addmm(block.double(), left, right, alpha=self.scaling)

    def merged(self, weight: Sequence[tuple[int, int]], rows: Any) -> Iterator[Tensor]:
        """Blocks of the merged weight in float64, from `rows(first, last)` of the base's. DoRA: eq. 5 of arXiv:2402.09353."""
        norms: Tensor | None = None
        if self.magnitude is not None and self.by_input:  # a norm runs over all inputs, and those are the rows
            squares = (self.added(rows(*span), span[0]).square().sum(0) for span in weight)
            norms = sum(squares, torch.zeros(())).sqrt()
        for span in weight:
            block = self.added(rows(*span), span[0])
            if self.magnitude is not None and norms is not None:
                block *= self.magnitude / norms
            elif self.magnitude is not None:
                block *= (self.magnitude[span[0] : span[1]] / block.norm(dim=1))[:, None]
            yield block
