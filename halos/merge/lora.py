"""What a LoRA adapter does to its base, and which kinds of LoRA this code knows how to merge."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftType
from torch import Tensor

from halos.errors import UserError
from halos.merge.base_weights import unwrapped

PREFIX = "base_model.model."
KEEP = "keep the adapter as it is with checkpoint.merge_lora=false"
COVERED = {  # what a LoraConfig may say; anything else must be as PEFT's default has it
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "runtime_config",
    "eva_config", "qalora_group_size", "megatron_core",
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
