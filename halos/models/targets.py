"""What an adapter changes: layers by name, parameters by name, and no router that nobody named.

The experts of a mixture are one parameter of three dimensions (experts, out, in), and no layers, once they are loaded. PEFT
turns names of layers that such experts had in other versions (gate_proj, w1, gate ...) into those parameters, the router and
twice the rank included, and so takes layers that bear the same names (shared experts, dense layers) for experts. Here a name
means what it matches; a layer whose name PEFT would turn into something else is adapted by its weight.
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
    """In PEFT's words."""

    modules: Wanted
    parameters: list[str]  # the ends of their names
    by_weight: list[str]  # modules that are adapted by their weight, since PEFT takes their names for something else


def resolve(model: PreTrainedModel, modules: Wanted, parameters: Sequence[str]) -> Targets:
    """What PEFT is to be given for peft.target_modules and peft.target_parameters. Raises UserError for what matches nothing."""
    names = {name for name, _ in model.named_parameters()}
    for end in parameters:
        if not any(_ends(name, end) for name in names):
            raise UserError(f"peft.target_parameters: {end} ends no parameter's name{_layers_hint(model)}")
    if not stacks(model) and not parameters and not (modules == ALL_LINEAR and _not_adaptable(model)):
        return Targets(modules, [], [])
    if modules is None:
        raise UserError(
            "peft.target_modules=null: say which layers, for example all-linear, or [] for peft.target_parameters alone"
        )
    chosen = _linear(model) if modules == ALL_LINEAR else _matched(model, modules)
    taken = {leaf for leaf in {_leaf(name) for name in chosen} if _peft_would_convert(model, leaf)}
    by_weight = [name for name in chosen if _leaf(name) in taken or _is_a_router(model.get_submodule(name))]
    left = [name for name in chosen if name not in by_weight]
    ends = _shortest([f"{name}.weight" for name in by_weight], names)
    return Targets(left, [*dict.fromkeys([*parameters, *ends])], by_weight)


def stacks(model: nn.Module) -> dict[str, int]:
    """Modules that hold their experts in parameters of three dimensions, by name; and how many experts."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):  # whose kernels have three dimensions too
            continue
        shapes = [parameter.shape for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
        if shapes and len({shape[0] for shape in shapes}) == 1:
            found[name] = int(shapes[0][0])
    return found


def routers(model: nn.Module) -> list[str]:
    """Modules that weigh experts, by name: those beside the experts with one output for each of them, or one for all."""
    found = []
    for stack, count in stacks(model).items():
        owner = _unwrapped(stack)
        block = owner.rpartition(".")[0]  # what holds the experts and their router
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            weight = getattr(module, "weight", None)
            beside = not name.startswith(f"{owner}.") and ".lora_" not in name
            if beside and isinstance(weight, nn.Parameter) and weight.dim() == 2 and len(weight) in (1, count) and count > 1:
                found.append(_unwrapped(name))
    return list(dict.fromkeys(found))


def _not_adaptable(model: nn.Module) -> list[str]:
    """Linear layers that PEFT would adapt without a word and wrongly: the step of a Mamba layer, which reads that weight itself
    and calls no layer, and products of groups."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name, module in linear if _leaf(name) == "dt_proj" or type(module).__name__.endswith("GroupedLinear")]


def _linear(model: PreTrainedModel) -> list[str]:
    """Every linear layer but the head, the routers and those that no adapter can change."""
    left = {*routers(model), *_not_adaptable(model)}
    last = [layer for layer in (model.get_output_embeddings(), getattr(model, "score", None)) if layer is not None]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in left and not any(module is layer for layer in last)
    ]


def _matched(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """The modules that names or a pattern choose, each by its own name."""
    modules = [name for name, _ in model.named_modules() if name]
    for one in [wanted] if isinstance(wanted, str) else wanted:
        config = LoraConfig(target_modules=one if isinstance(wanted, str) else [one])
        if not any(check_target_module_exists(config, name) for name in modules):
            raise UserError(f"peft.target_modules: {one} is no layer of this model{_layers_hint(model)}")
    config = LoraConfig(target_modules=wanted)
    return [name for name in modules if check_target_module_exists(config, name)]


def _peft_would_convert(model: PreTrainedModel, leaf: str) -> bool:
    """Whether PEFT would adapt something else for this name. It says so by changing what it is given, or by refusing."""
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return True
    return config.target_modules != {leaf}


def _is_a_router(module: nn.Module) -> bool:
    """A table that is no layer of torch's own."""
    weight = getattr(module, "weight", None)
    return not isinstance(module, nn.Linear | Conv1D | nn.Embedding) and isinstance(weight, nn.Parameter) and weight.dim() == 2


def _unwrapped(name: str) -> str:
    return re.sub(r"(\.base_layer)+$", "", name)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _shortest(wanted: Sequence[str], names: Iterable[str]) -> list[str]:
    """Ends of names, as short as may be, that match those wanted and nothing else."""
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
    """How the experts' parameters are named, as target_parameters takes them."""
    ends = []
    for stack in stacks(model):
        module = model.get_submodule(stack)
        ends += [
            f"{_leaf(_unwrapped(stack))}.{name}" for name, value in module.named_parameters(recurse=False) if value.dim() == 3
        ]
    return list(dict.fromkeys(ends))


def lines(model: nn.Module) -> list[str]:
    """For a mixture of experts: what its adapter changes and what it leaves alone; nothing for other models."""
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
    said = [f"on {', '.join(changed)}" + (f"; the router ({', '.join(sorted(spared))}) stays as it is" if spared else "")]
    if alone := [end for end in experts(model) if end not in weights]:
        said.append(f"the experts stay as they are: peft.target_parameters=[{','.join(alone)}] adapts them too")
    return said
