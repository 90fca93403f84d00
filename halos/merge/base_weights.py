"""The base of a merge: the tensors of its weight files under the model's names."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from halos import confined
from halos.errors import UserError
from halos.merge.expert_layout import FusedTensor, expert_slices, stacked_shapes
from halos.merge.safetensors_io import SafeFile, blocks, weight_files


def unwrapped(name: str) -> str:
    """Return a tensor's name in the model without PEFT's wrappers."""
    for wrapper in (".base_layer.", ".original_module.", ".modules_to_save.default.", ".modules_to_save."):
        while wrapper in name:  # wrappers can be nested
            name = name.replace(wrapper, ".")
    return name


class TensorNames:
    """Maps tensor names of the weight files to the model's names, by the rules of from_pretrained."""

    def __init__(self, model: PreTrainedModel) -> None:
        # transformers strips or adds the prefix where the other spelling has a value here that is not None
        self.expected = dict.fromkeys((unwrapped(name) for name in model.state_dict() if ".lora_" not in name), True)
        self._prefix, self._plan = model.base_model_prefix, model._get_dtype_plan
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def __call__(self, name: str) -> tuple[str | None, tuple[WeightConverter, int] | None]:
        """Return the model's name for a tensor of the files, or None if there is none (a dropped LM head); and, if loading
        fuses or splits the tensor, the rule for that with the index of its source pattern."""
        in_model, converted = rename_source_key(name, self._renamings, self._converters, self._prefix, self.expected)
        if in_model not in self.expected and name in self.expected:
            in_model, converted = rename_source_key(name, [], [], self._prefix, self.expected)
        rules = ((rule, rule.source_patterns.index(converted)) for rule in self._converters if converted in rule.source_patterns)
        return (in_model if in_model in self.expected else None), next(rules, None)

    def dtype_of(self, in_model: str, dtype: torch.dtype) -> torch.dtype:
        """Return a tensor's dtype in a model of `dtype`: some stay float32, such as a router's correction bias."""
        kept = any(re.search(pattern.replace("*", ".*"), in_model) for pattern in self._plan(dtype))
        return torch.float32 if kept else dtype


class BaseWeights:
    """The weights of the base on the disk. Raises UserError if they are quantised or pickled.

    `locations` has the tensors of the files that are one tensor of the model, `slices` those that are part of a stacked
    parameter; `stacked` the shape of each three-dimensional parameter, however the files hold it; `absent` the name of a tied
    embedding or head that the files leave out, and the name of the other.
    """

    def __init__(self, base: Path, model: PreTrainedModel) -> None:
        settings = confined.load_object(base / "config.json")
        if settings.get("quantization_config"):
            raise UserError(f"cannot merge: the weights of {base} are quantised on disk; give the model they were made from")
        self.path, names = base, TensorNames(model)
        self.dtype_of = names.dtype_of
        self.files = [SafeFile(path) for path in weight_files(base)]
        tensors = {name: (file, *names(name)) for file in self.files for name in file.names}
        self.tensors = {name: (file, in_model) for name, (file, in_model, _) in tensors.items() if in_model is not None}
        self.dropped = sorted(name for name, (_, in_model, _) in tensors.items() if in_model is None)
        self.fused = {in_model for _, in_model, rule in tensors.values() if rule}
        self.fused_tensors = [
            FusedTensor(name, in_model, *rule, file.shape(name))
            for name, (file, in_model, rule) in tensors.items()
            if in_model and rule
        ]
        self.slices = expert_slices(self.fused_tensors)
        self.locations = {in_model: (file, name) for name, (file, in_model) in self.tensors.items() if in_model not in self.fused}
        self.stacked = stacked_shapes(self.fused_tensors, self.slices) | {
            in_model: file.shape(name) for in_model, (file, name) in self.locations.items() if len(file.shape(name)) == 3
        }
        self._refuse_duplicates()
        self.expected, self.modules = names.expected, _modules(model)
        self.embedding, self.head = (
            _name_of(model, each) for each in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        pair = {each for each in (self.embedding, self.head) if each is not None}
        bias = self.head.replace(".weight", ".bias") if self.head else None
        self.tables = pair | ({bias} & self.expected.keys())  # tensors with a row for each token id
        configs = (model.config, model.config.get_text_config())
        self.tied_by_config = any(getattr(each, "tie_word_embeddings", False) for each in configs)
        self.diverged = self.tied_by_config and self._differ(pair)
        self.tied = len(pair) == 2 and self.tied_by_config and not self.diverged
        missing = pair - self.locations.keys()
        self.absent: tuple[str, str] | None = None
        if self.tied and len(missing) == 1:
            self.absent = (missing.pop(), (pair & self.locations.keys()).pop())

    def _refuse_duplicates(self) -> None:
        for name, (_, in_model) in self.tensors.items():
            if in_model in self.locations and self.locations[in_model][1] != name:
                raise UserError(
                    f"cannot merge: {self.path} has {name} and {self.locations[in_model][1]}, and both are the model's {in_model}"
                )

    def _differ(self, pair: set[str]) -> bool:
        """Whether the files hold two different tensors for a pair that the configuration ties: loading then does not tie them."""
        if len(pair) < 2 or not pair <= self.locations.keys():
            return False
        (one, one_name), (other, other_name) = (self.locations[each] for each in sorted(pair))
        if one.shape(one_name) != other.shape(other_name):
            return True
        return any(not torch.equal(a, b) for a, b in zip(blocks(one, one_name), blocks(other, other_name), strict=True))


def _modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the innermost module at each name, PEFT's wrappers left out."""
    return {unwrapped(f"{name}.").removesuffix("."): module for name, module in model.named_modules() if ".lora_" not in name}


def _name_of(model: PreTrainedModel, layer: nn.Module | None) -> str | None:
    """Return the name of a layer's weight; of a layer with an adapter, that of the base's weight."""
    names = [name for name, module in model.named_modules() if module is layer]
    return unwrapped(f"{names[0]}.weight") if names else None
