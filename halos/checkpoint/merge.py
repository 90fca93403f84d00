"""Merge a LoRA adapter into its base: W = W_base + (alpha/r) B A, streamed tensor by tensor, never a second model.

Read from the base's safetensors, computed in float32, rounded once to the output dtype. Scaling comes from the adapter
itself. Covered: LoRA, rsLoRA, DoRA, rank and alpha patterns, biases, modules_to_save, Conv1D layers. Whatever else an
adapter holds is refused by name before anything is written.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from halos.checkpoint.safefile import SafeFile, write
from halos.errors import UserError

PREFIX = "base_model.model."


@dataclass(slots=True)
class Update:
    """What an adapter does to one layer's weight."""

    tensors: dict[str, str] = field(default_factory=dict)  # lora_A, lora_B, lora_magnitude_vector -> name in the file
    scaling: float = 1.0
    transposed: bool = False  # Conv1D stores (in, out)


@dataclass(slots=True)
class Plan:
    """Which tensors of the base are updated, and which are replaced or added whole."""

    updates: dict[str, Update]  # layer name -> update
    replaced: dict[str, str]  # tensor name -> name in the adapter's file


def _pattern(patterns: dict[str, Any], layer: str, default: float) -> float:
    """PEFT's own rule: the first pattern that matches the end of the layer's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return default


def scaling(config: LoraConfig, layer: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
    alpha = _pattern(config.alpha_pattern or {}, layer, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def plan(adapter: SafeFile, config: LoraConfig) -> Plan:
    """Sort an adapter's tensors. Raises UserError for those that this module does not know how to merge."""
    result, unknown = Plan({}, {}), []
    for name in adapter.names:
        bare = name.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?", bare):
            result.updates.setdefault(match[1], Update()).tensors[match[2]] = name
        elif "lora_" in bare or "trainable_tokens" in bare:
            unknown.append(bare)
        else:
            result.replaced[bare.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
    unknown += [f"{layer} (incomplete)" for layer, u in result.updates.items() if not {"lora_A", "lora_B"} <= u.tensors.keys()]
    if unknown:
        raise UserError(f"cannot merge this adapter: {unknown[0]} is not covered; keep it with checkpoint.merge_lora=false")
    for layer, update in result.updates.items():
        rank = adapter.shape(update.tensors["lora_A"])[0]
        update.scaling = scaling(config, layer, rank)
        update.transposed = config.fan_in_fan_out
    return result


def updated(weight: Tensor, update: Update, adapter: SafeFile) -> Tensor:
    """The merged weight in float32, in the layout that `weight` has."""
    a, b = (adapter.read(update.tensors[name]).float() for name in ("lora_A", "lora_B"))
    result = weight.T.float() if update.transposed else weight.float()
    result = torch.addmm(result, b, a, alpha=update.scaling)
    if magnitude := update.tensors.get("lora_magnitude_vector"):  # DoRA, eq. 5 of arXiv:2402.09353
        result *= (adapter.read(magnitude).float() / result.norm(dim=1))[:, None]
    return result.T if update.transposed else result


def _base_files(base: Path) -> list[Path]:
    files = sorted(base.glob("*.safetensors"))
    index = base / "model.safetensors.index.json"
    if index.exists():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        files = [path for path in files if path.name in wanted]
    return files


class Names:
    """How a file of the base spells what the model calls its tensors, by the rules that from_pretrained follows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.expected = {unwrapped(name): None for name in model.state_dict() if ".lora_" not in name}
        self._prefix = model.base_model_prefix
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def __call__(self, name: str) -> str | None:
        """The model's name for a tensor of the file; None for one that it does not have (a dropped LM head).

        Raises UserError where loading fuses or splits the tensor, so that no single one stands for the model's.
        """
        mine, converted = rename_source_key(name, self._renamings, self._converters, self._prefix, self.expected)
        if converted is not None:
            raise UserError(f"cannot merge: {name} is fused with others when it is loaded, which is not covered")
        return mine if mine in self.expected else None


def unwrapped(name: str) -> str:
    """A tensor's name in the model without PEFT's wrappers."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".").replace(".modules_to_save.default.", ".")


def merge(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    model: PreTrainedModel,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Write merged safetensors into `output`, a file for each of the base's, and config.json; what was done, for the report.

    `model` (its layers may carry the adapter, or lie on the meta device) says what the tensors are called; none of its
    weights is read. Raises UserError, before a byte is written, where the adapter does not fit the base.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures, config.dtype = [type(model).__name__], dtype
    delta, names = SafeFile(adapter / "adapter_model.safetensors"), Names(model)
    kind = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(kind, LoraConfig):
        raise UserError(f"{adapter} is a {kind.peft_type} adapter; only LoRA can be merged")
    todo = plan(delta, kind)
    files = _base_files(base)
    layout = [{name: names(name) for name in SafeFile(path).names} for path in files]
    present = {name for table in layout for name in table.values() if name is not None}
    lost = sorted(layer for layer in todo.updates if f"{layer}.weight" not in present)
    if lost:
        raise UserError(f"cannot merge: the adapter changes {lost[0]}, which {base} does not have")
    if getattr(config, "tie_word_embeddings", False) and (set(todo.replaced) - present) & {"lm_head.weight", "embed_out.weight"}:
        config.tie_word_embeddings = False
    added = sorted(set(todo.replaced) - present)
    weight_map: dict[str, str] = {}
    for number, (path, table) in enumerate(zip(files, layout, strict=True), 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        extra = added if number == len(files) else []
        entries = _entries(SafeFile(path), table, todo, delta, extra, dtype)
        write(output / name, entries, _tensors(path, table, todo, delta, extra, dtype))
        weight_map |= dict.fromkeys(entries, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum((output / f).stat().st_size for f in set(weight_map.values()))}}
        (output / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": weight_map}, indent=1))
    config.save_pretrained(output)
    return {"merged": len(todo.updates), "replaced": sorted(set(todo.replaced) & present), "added": added,
            "dropped": sorted(name for table in layout for name, mine in table.items() if mine is None)}  # fmt: skip


def _entries(
    base: SafeFile, table: dict[str, str | None], todo: Plan, delta: SafeFile, extra: list[str], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, list[int]]]:
    entries = {}
    for name, mine in table.items():
        if mine is not None:
            source = (delta, todo.replaced[mine]) if mine in todo.replaced else (base, name)
            kind = source[0].dtype(source[1])
            entries[name] = (dtype if kind.is_floating_point else kind, source[0].shape(source[1]))
    return entries | {name: (dtype, delta.shape(todo.replaced[name])) for name in extra}


def _tensors(
    path: Path, table: dict[str, str | None], todo: Plan, delta: SafeFile, extra: list[str], dtype: torch.dtype
) -> Iterator[Tensor]:
    with safe_open(path, framework="pt") as base:
        for name, mine in table.items():
            if mine is None:
                continue
            layer = mine.removesuffix(".weight")
            if mine in todo.replaced:
                tensor = delta.read(todo.replaced[mine])
            elif layer in todo.updates and mine != layer:
                tensor = updated(base.get_tensor(name), todo.updates[layer], delta)
            else:
                tensor = base.get_tensor(name)
            yield tensor.to(dtype) if tensor.is_floating_point() else tensor
    for name in extra:
        yield delta.read(todo.replaced[name]).to(dtype)
