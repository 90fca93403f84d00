"""The optimizer of a run: its parameter groups, and the checks and sizes that need no weights."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from halos.config.bind_optim import OptimizerSpec
from halos.distributed.parameters import shape_of
from halos.errors import UserError
from halos.logps.model import ModelWithHead

Named = Sequence[tuple[str, nn.Parameter]]
LORA_B = re.compile(r"\.lora_(?:embedding_)?B\b")


def make_optimizer(module: nn.Module, spec: OptimizerSpec) -> Optimizer:
    """Create the optimizer over the trained parameters of `module`."""
    return make_optimizer_over(trained_parameters(module), spec, hidden_matrices(module))


def make_optimizer_over(named: Named, spec: OptimizerSpec, hidden: frozenset[nn.Parameter]) -> Optimizer:
    """Create the optimizer over named parameters; `hidden` are the matrices of hidden layers among them."""
    arguments: dict[str, Any] = {"hidden": hidden} if "hidden" in spec.extra_arguments else {}
    optimizer = spec.make(parameter_groups(named, spec), **arguments)
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optim {spec.name} gives a {type(optimizer).__name__}, and no torch.optim.Optimizer")
    return optimizer


def trained_parameters(module: nn.Module) -> Named:
    """Return them by their names in the model itself, whatever wraps it; those of a value head begin with value_head."""
    whole = next((part for part in module.modules() if isinstance(part, ModelWithHead)), None)
    named = module.named_parameters() if whole is None else whole.named_parameters()
    wrapped = "" if whole is None else "model."
    return [(name.removeprefix(wrapped), parameter) for name, parameter in named if parameter.requires_grad]


def parameter_groups(named: Named, spec: OptimizerSpec) -> list[dict[str, Any]]:
    """Group parameters by learning rate and weight decay (none for norms and biases); those with the default rate come first."""
    parts: dict[tuple[float, bool], list[nn.Parameter]] = {(spec.lr, True): [], (spec.lr, False): []}
    for name, parameter in named:
        parts.setdefault((learning_rate_of(name, spec), len(shape_of(parameter)) >= 2), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": spec.weight_decay if is_decayed else 0.0}
        for (rate, is_decayed), parameters in parts.items()
        if parameters
    ]


def learning_rate_of(name: str, spec: OptimizerSpec) -> float:
    """Return a parameter's peak learning rate: by its name, that of LoRA's B matrices, or the optimizer's."""
    rates = {rate for pattern, rate in spec.lr_by_name.items() if re.search(pattern, name)}
    if len(rates) > 1:
        raise UserError(
            f"optim.lr_by_name gives {name} several learning rates: {', '.join(f'{rate:g}' for rate in sorted(rates))}"
        )
    if rates:
        return rates.pop()
    return spec.lr * (spec.loraplus_lr_ratio or 1.0) if LORA_B.search(name) else spec.lr


def hidden_matrices(module: nn.Module) -> frozenset[nn.Parameter]:
    """Return the weights of linear layers inside the model's blocks, which excludes embeddings and the head."""
    layers = [child for child in module.modules() if isinstance(child, GradientCheckpointingLayer)]
    parts = (part for layer in layers for part in layer.modules() if not isinstance(part, nn.Embedding))
    owned = (each for part in parts for each in part.named_parameters(recurse=False))
    return frozenset(parameter for name, parameter in owned if name == "weight" and len(shape_of(parameter)) == 2)


def refuse_unfit(module: nn.Module, spec: OptimizerSpec, *, more: Iterable[str] = ()) -> None:
    """Raises UserError for optimizer settings that match no trained parameter. `more`: names of parameters to be added."""
    names = [name for name, _ in trained_parameters(module)] + [*more]
    for name in names:
        learning_rate_of(name, spec)
    for pattern in spec.lr_by_name:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"optim.lr_by_name: no trained parameter's name matches {pattern!r}; there is {names[0]}, for one")
    if "hidden" in spec.extra_arguments and not any(p.requires_grad for p in hidden_matrices(module)):
        raise UserError(
            f"optim {spec.name} is for matrices of hidden layers, and no trained parameter is one: choose another optimizer"
        )


def state_bytes(module: nn.Module, spec: OptimizerSpec, sizes: Mapping[str, float]) -> int:
    """Return the bytes of optimizer state for the trained parameters; `sizes` has the bytes per element by kind."""
    hidden = hidden_matrices(module) if "hidden" in spec.extra_arguments else frozenset()
    total = 0.0
    for _, parameter in trained_parameters(module):
        kind = "hidden" if parameter in hidden else "matrix" if len(shape_of(parameter)) >= 2 else "vector"
        total += shape_of(parameter).numel() * sizes[kind]
    return round(total)
