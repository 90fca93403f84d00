"""The base of a merge: its tensors on the disk under the names that the model has for them."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from halos import confined
from halos.errors import UserError
from halos.merge.pieces import Part, pieces, shapes
from halos.merge.safetensors_io import SafeFile, blocks, weight_files


def unwrapped(name: str) -> str:
    """A tensor's name in the model without PEFT's wrappers."""
    for wrapper in (".base_layer.", ".original_module.", ".modules_to_save.default.", ".modules_to_save."):
        while wrapper in name:  # one may lie within another
            name = name.replace(wrapper, ".")
    return name


class Names:
    """How a file of the base spells what the model calls its tensors, by the rules that from_pretrained follows."""

    def __init__(self, model: PreTrainedModel) -> None:
        # transformers takes a prefix off or puts one on where the other spelling has a value here that is not None
        self.expected = dict.fromkeys((unwrapped(name) for name in model.state_dict() if ".lora_" not in name), True)
        self._prefix, self._plan = model.base_model_prefix, model._get_dtype_plan
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def __call__(self, name: str) -> tuple[str | None, tuple[WeightConverter, int] | None]:
        """The model's name for a tensor of the file, or None for one that it does not have (a dropped LM head); and the rule
        by which loading fuses or splits the tensor, so that no single one stands for the model's, with its source there."""
        mine, converted = rename_source_key(name, self._renamings, self._converters, self._prefix, self.expected)
        if mine not in self.expected and name in self.expected:
            mine, converted = rename_source_key(name, [], [], self._prefix, self.expected)
        rules = ((rule, rule.source_patterns.index(converted)) for rule in self._converters if converted in rule.source_patterns)
        return (mine if mine in self.expected else None), next(rules, None)

    def dtype_of(self, mine: str, dtype: torch.dtype) -> torch.dtype:
        """In a model of `dtype`: some of the model's tensors are float32 in all, a router's correction bias for one."""
        kept = any(re.search(pattern.replace("*", ".*"), mine) for pattern in self._plan(dtype))
        return torch.float32 if kept else dtype


class Source:
    """The base on disk under the names of the model. Raises UserError for one whose weights are quantised or pickled.

    `where` has the tensors that stand for one of the model's, `pieces` those that are experts of one, and `stacked` the shapes
    of all that have three dimensions, however they are held; `absent` is the half of a tied pair that the files leave out,
    with the other half.
    """

    def __init__(self, base: Path, model: PreTrainedModel) -> None:
        settings = confined.load_object(base / "config.json")
        if settings.get("quantization_config"):
            raise UserError(f"cannot merge: the weights of {base} are quantised on disk; give the model they were made from")
        self.path, names = base, Names(model)
        self.dtype_of = names.dtype_of
        self.files = [SafeFile(path) for path in weight_files(base)]
        found = {name: (file, *names(name)) for file in self.files for name in file.names}
        self.tensors = {name: (file, mine) for name, (file, mine, _) in found.items() if mine is not None}
        self.dropped = sorted(name for name, (_, mine, _) in found.items() if mine is None)
        self.fused = {mine for _, mine, rule in found.values() if rule}
        self.parts = [Part(name, mine, *rule, file.shape(name)) for name, (file, mine, rule) in found.items() if mine and rule]
        self.pieces = pieces(self.parts)
        self.where = {mine: (file, name) for name, (file, mine) in self.tensors.items() if mine not in self.fused}
        self.stacked = shapes(self.parts, self.pieces) | {
            mine: file.shape(name) for mine, (file, name) in self.where.items() if len(file.shape(name)) == 3
        }
        self._refuse_twins()
        self.expected, self.kinds = names.expected, _layers(model)
        self.embedding, self.head = (
            _name_of(model, each) for each in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        pair = {each for each in (self.embedding, self.head) if each is not None}
        bias = self.head.replace(".weight", ".bias") if self.head else None
        self.tables = pair | ({bias} & self.expected.keys())  # what has a row for each id
        configs = (model.config, model.config.get_text_config())
        self.tied_by_config = any(getattr(each, "tie_word_embeddings", False) for each in configs)
        self.diverged = self.tied_by_config and self._differ(pair)
        self.tied = len(pair) == 2 and self.tied_by_config and not self.diverged
        lost = pair - self.where.keys()
        self.absent: tuple[str, str] | None = None
        if self.tied and len(lost) == 1:
            self.absent = (lost.pop(), (pair & self.where.keys()).pop())

    def _refuse_twins(self) -> None:
        for name, (_, mine) in self.tensors.items():
            if mine in self.where and self.where[mine][1] != name:
                raise UserError(
                    f"cannot merge: {self.path} has {name} and {self.where[mine][1]}, and both are the model's {mine}"
                )

    def _differ(self, pair: set[str]) -> bool:
        """Whether the files hold both of a pair that the configuration ties, and not the same: then loading ties nothing."""
        if len(pair) < 2 or not pair <= self.where.keys():
            return False
        (one, mine), (other, theirs) = (self.where[each] for each in sorted(pair))
        if one.shape(mine) != other.shape(theirs):
            return True
        return any(not torch.equal(a, b) for a, b in zip(blocks(one, mine), blocks(other, theirs), strict=True))


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules by their names without PEFT's wrappers, each the innermost."""
    return {unwrapped(f"{name}.").removesuffix("."): module for name, module in model.named_modules() if ".lora_" not in name}


def _name_of(model: PreTrainedModel, layer: nn.Module | None) -> str | None:
    """The name of a layer's weight; of a layer that carries an adapter, the base's."""
    names = [name for name, module in model.named_modules() if module is layer]
    return unwrapped(f"{names[0]}.weight") if names else None
