"""Resolve LoRA targets: layers and parameters by name, and routers only where they are named.

The experts of a mixture are, once loaded, no layers but one parameter of three dimensions (experts, out, in). PEFT converts the
names of layers that such experts had in other versions (gate_proj, w1, gate ...) into those parameters, router and doubled rank
included, and so mistakes other layers of the same names (shared experts, dense layers) for experts. Here a name means what it
matches; a layer whose name PEFT would convert is adapted by its weight.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halos.errors import UserError

ALL_LINEAR = "all-linear"
Wanted = str | list[str] | None


@dataclass(frozen=True, slots=True)
class Targets:
    """Arguments of PEFT's LoraConfig, but for `by_weight`."""

    modules: Wanted
    parameters: list[str]  # suffixes of their names
    by_weight: list[str]  # modules adapted by their weight, since PEFT would convert their names


def resolve(model: PreTrainedModel, modules: Wanted, parameters: Sequence[str]) -> Targets:
    """Resolve peft.target_modules and peft.target_parameters for PEFT. Raises UserError for a name that matches nothing."""
    names = {name for name, _ in model.named_parameters()}
    for end in parameters:
        if not any(_ends(name, end) for name in names):
            raise UserError(f"peft.target_parameters: no parameter's name ends in {end}{_layers_hint(model)}")
    if not stacks(model) and not parameters and not (modules == ALL_LINEAR and _not_adaptable(model)):
        return Targets(modules, [], [])
    if modules is None:
        raise UserError(
            "peft.target_modules=null: say which layers, for example all-linear, or [] for peft.target_parameters alone"
        )
    chosen = _linear(model) if modules == ALL_LINEAR else _matched(model, modules)
    converted = {leaf for leaf in {_leaf(name) for name in chosen} if _peft_would_convert(model, leaf)}
    by_weight = [name for name in chosen if _leaf(name) in converted or _is_a_router(model.get_submodule(name))]
    by_name = [name for name in chosen if name not in by_weight]
    ends = _shortest([f"{name}.weight" for name in by_weight], names)
    return Targets(by_name, [*dict.fromkeys([*parameters, *ends])], by_weight)


def stacks(model: nn.Module) -> dict[str, int]:
    """Return the modules that hold experts in parameters of three dimensions: name -> number of experts."""
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):  # its kernel has three dimensions too
            continue
        shapes = [parameter.shape for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
        if shapes and len({shape[0] for shape in shapes}) == 1:
            counts[name] = int(shapes[0][0])
    return counts


def routers(model: nn.Module) -> list[str]:
    """Return the names of routers: modules next to the experts with one output per expert, or a single one."""
    names = []
    for stack, count in stacks(model).items():
        owner = _unwrapped(stack)
        block = owner.rpartition(".")[0]  # the parent of the experts and their router
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            weight = getattr(module, "weight", None)
            is_neighbour = not name.startswith(f"{owner}.") and ".lora_" not in name
            if (
                is_neighbour
                and isinstance(weight, nn.Parameter)
                and weight.dim() == 2
                and len(weight) in (1, count)
                and count > 1
            ):
                names.append(_unwrapped(name))
    return list(dict.fromkeys(names))


def _not_adaptable(model: nn.Module) -> list[str]:
    """Return linear layers that PEFT would silently adapt wrongly: Mamba's dt_proj, whose weight is used without calling the
    layer, and grouped linear layers."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name, module in linear if _leaf(name) == "dt_proj" or type(module).__name__.endswith("GroupedLinear")]


def _linear(model: PreTrainedModel) -> list[str]:
    """Return every linear layer except the head, the routers and those that cannot be adapted."""
    excluded = {*routers(model), *_not_adaptable(model)}
    named = (getattr(model, name, None) for name in ("score", "classifier"))  # of a reward model
    heads = [layer for layer in (model.get_output_embeddings(), *named) if layer is not None]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in excluded and not any(module is layer for layer in heads)
    ]


def _matched(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """Return the full names of the modules that match a list of names or a pattern."""
    if others := unmatched(model, wanted):
        raise UserError(f"peft.target_modules: {others[0]} is no layer of this model{_layers_hint(model)}")
    config = LoraConfig(target_modules=wanted)
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]


def unmatched(model: nn.Module, wanted: Wanted) -> list[str]:
    """Return the names, or the pattern, that match no module: PEFT ignores one name of several silently."""
    if wanted is None or wanted == ALL_LINEAR:
        return []
    modules = [name for name, _ in model.named_modules() if name]
    configs = {one: LoraConfig(target_modules=one if isinstance(wanted, str) else [one])
               for one in ([wanted] if isinstance(wanted, str) else wanted)}  # fmt: skip
    return [one for one, config in configs.items() if not any(check_target_module_exists(config, name) for name in modules)]


def _peft_would_convert(model: PreTrainedModel, leaf: str) -> bool:
    """Return whether PEFT would convert this name: it then changes target_modules, or raises ValueError."""
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return True
    return config.target_modules != {leaf}


def _is_a_router(module: nn.Module) -> bool:
    """Return whether a module is a router: a matrix that is no layer of torch's own."""
    weight = getattr(module, "weight", None)
    return not isinstance(module, nn.Linear | Conv1D | nn.Embedding) and isinstance(weight, nn.Parameter) and weight.dim() == 2


def _unwrapped(name: str) -> str:
    return re.sub(r"(\.base_layer)+$", "", name)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _shortest(wanted: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the shortest suffixes of names that match the wanted ones and nothing else."""
    names, ends = set(names), []
    for name in wanted:
        parts = name.split(".")
        longer = (".".join(parts[-length:]) for length in range(min(3, len(parts)), len(parts) + 1))
        ends.append(next((end for end in longer if {each for each in names if _ends(each, end)} <= {*wanted}), name))
    return list(dict.fromkeys(ends))


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _layers_hint(model: nn.Module) -> str:
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)})
    hint = f"; its linear layers are {', '.join(linear)}"
    if ends := experts(model):
        hint += f", and its experts are one parameter each: peft.target_parameters=[{','.join(ends)}]"
    return hint


def experts(model: nn.Module) -> list[str]:
    """Return the suffixes of the experts' parameters, as peft.target_parameters takes them."""
    ends = []
    for stack in stacks(model):
        module = model.get_submodule(stack)
        ends += [
            f"{_leaf(_unwrapped(stack))}.{name}" for name, value in module.named_parameters(recurse=False) if value.dim() == 3
        ]
    return list(dict.fromkeys(ends))


def lines(model: nn.Module) -> list[str]:
    """Describe, for a mixture of experts, what its adapter changes and what it does not; empty for other models."""
    if not isinstance(model, PeftModel) or not stacks(model):
        return []
    layers, weights = set(), set()
    spared = {_leaf(name) for name in routers(model)}
    for name, module in model.named_modules():
        path = _unwrapped(name).split(".")
        if isinstance(module, ParamWrapper):
            weights.add(".".join([*(path[-2:] if module.parameter_name == "weight" else path[-1:]), module.parameter_name]))
        elif isinstance(module, LoraLayer):
            layers.add(path[-1])
        if isinstance(module, LoraLayer):
            spared.discard(path[-1])
    changed = sorted({*layers, *(name.removesuffix(".weight") for name in weights)})
    text = [f"on {', '.join(changed)}" + (f"; the router ({', '.join(sorted(spared))}) is not adapted" if spared else "")]
    if alone := [end for end in experts(model) if end not in weights]:
        text.append(f"the experts are not adapted: peft.target_parameters=[{','.join(alone)}] adapts them too")
    return text
