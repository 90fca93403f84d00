"""Try an optimizer on a few small parameters before any weights are read: whether it resumes from its saved state bit for bit,
whether parameters may be sharded, and how much state it keeps."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from numbers import Number
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from halos.config.bind_optim import OptimizerSpec
from halos.distributed.device import seed_generators
from halos.errors import UserError
from halos.run.optimizer import make_optimizer_over

SHAPES = {"hidden": (72, 130), "matrix": (66, 130), "vector": (130,)}  # too large for moments of 8 bits to stay whole, and uneven
LR = 0.01
SPLIT = 29  # rows of a matrix, or elements of a vector, in the first shard
SCHEDULE = (0.5, 1.0, 0.25)  # of LR, one entry per step
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
Shard = Callable[[Tensor], list[Tensor]]
Layout = Literal["whole", "rows", "flat"]  # what the optimizer gets of a parameter: all, some rows, or flat elements


class _Parameters(nn.Module):
    """A few parameters, each whole or as several shards."""

    def __init__(self, values: Mapping[str, list[Tensor]]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {name: nn.ParameterList(nn.Parameter(shard.clone()) for shard in shards) for name, shards in values.items()}
        )

    def shards(self, name: str) -> list[nn.Parameter]:
        return list(self.parts[name].parameters())

    def whole(self) -> dict[str, Tensor]:
        return {name: torch.cat([shard.detach().flatten() for shard in self.shards(name)]) for name in self.parts}


def try_out(spec: OptimizerSpec, device: torch.device, layout: Layout) -> dict[str, float]:
    """Return the bytes of optimizer state per element of a hidden layer's matrix, of another matrix, and of a vector. Raises
    UserError for an optimizer that cannot resume exactly, ignores parameters, the learning rate of its groups or weight decay, or
    cannot work with `layout`."""
    spec = replace(spec, lr=LR, lr_by_name={}, loraplus_lr_ratio=None)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        seed_generators(device, 0)
        start = {name: torch.randn(shape).to(device) for name, shape in SHAPES.items()}
        gradients = [{name: torch.randn(shape).to(device) for name, shape in SHAPES.items()} for _ in SCHEDULE]
        try:
            module = _Parameters({name: [value] for name, value in start.items()})
            optimizer = _make(module, spec)
            _steps(module, optimizer, gradients, 0, 1)
            values, state, unsaved = module.whole(), _saved(module, optimizer), _unsaved(optimizer)
            _steps(module, optimizer, gradients, 2)
            _refuse_lost(unsaved, _unsaved(optimizer), spec)
            resumed = _resumed(values, state, spec, gradients)
            undecayed = _after_all_steps(start, without := replace(spec, weight_decay=0.0), gradients)
            at_one_rate = _after_all_steps(start, spec, gradients, rates=(1.0,) * len(SCHEDULE))
            _refuse_kept(optimizer, start, spec, gradients)
        except UserError:
            raise
        except Exception as error:  # a user's own may raise anything
            message = " ".join(str(error).split())
            raise UserError(f"optim {spec.name} fails on small parameters: {type(error).__name__}: {message}") from error
        if not _equal(module.whole(), resumed):
            raise UserError(
                f"optim {spec.name} does not resume from its saved state bit for bit: everything that a step changes must be"
                " tensors in self.state[parameter]"
            )
        _refuse_idle(module.whole(), start, at_one_rate, spec)
        if spec.weight_decay and _equal(module.whole(), undecayed):
            raise UserError(f"optim.weight_decay={spec.weight_decay:g}: {spec.name} has no weight decay; leave it out")
        if layout != "whole":
            _refuse_sharding(
                undecayed, start, without, gradients, layout
            )  # undecayed: a flat shard does not show whether it decays
        return _sizes(module, optimizer)


def _make(module: _Parameters, spec: OptimizerSpec) -> Optimizer:
    return make_optimizer_over(list(module.named_parameters()), spec, frozenset(module.shards("hidden")))


def _steps(
    module: _Parameters,
    optimizer: Optimizer,
    gradients: Sequence[Mapping[str, Tensor]],
    *numbers: int,
    rates: Sequence[float] = SCHEDULE,
) -> None:
    for number in numbers:
        for name in SHAPES:
            shards = module.shards(name)
            parts = gradients[number][name].flatten().split([shard.numel() for shard in shards])
            for shard, part in zip(shards, parts, strict=True):
                shard.grad = part.reshape(shard.shape).clone()
        for group in optimizer.param_groups:
            group["lr"] = LR * rates[number]
        seed_generators(
            module.shards("vector")[0].device, number
        )  # for optimizers that draw random numbers: a run saves its generators
        optimizer.step()
        optimizer.zero_grad()


def _after_all_steps(
    start: Mapping[str, Tensor],
    spec: OptimizerSpec,
    gradients: Sequence[Mapping[str, Tensor]],
    shard: Shard | None = None,
    rates: Sequence[float] = SCHEDULE,
) -> dict[str, Tensor]:
    """Return the parameters after all steps, whole or sharded by `shard`."""
    module = _Parameters({name: [value] if shard is None else shard(value) for name, value in start.items()})
    _steps(module, _make(module, spec), gradients, *range(len(SCHEDULE)), rates=rates)
    return module.whole()


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether all values are equal bit for bit."""
    return all(torch.equal(value.view(torch.int32), other[name].view(torch.int32)) for name, value in one.items())


def _saved(module: _Parameters, optimizer: Optimizer) -> bytes:
    """Serialise the optimizer state as a checkpoint does: tensors, in safetensors."""
    flat = get_optimizer_state_dict(module, optimizer, options=FLAT)
    state = {name: value for name, value in flat.items() if name.startswith("state.")}
    for name, value in state.items():
        if type(value) is not Tensor:
            key = name.rpartition(".")[2]
            raise UserError(
                f"optim: the optimizer keeps {key!r} in its state as {type(value).__name__}, which a checkpoint cannot hold:"
                " use a plain tensor, for a number torch.tensor(0.0)"
            )
    return save({name: value.detach().contiguous() for name, value in state.items() if isinstance(value, Tensor)})


def _unsaved(optimizer: Optimizer) -> dict[str, Any]:
    """Return what the optimizer keeps outside its state, by name: the plain values of its attributes and its groups' settings."""
    kept = {f"self.{name}": value for name, value in vars(optimizer).items() if name not in ("state", "param_groups", "defaults")}
    for number, group in enumerate(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key not in ("params", "lr") and not isinstance(value, Tensor)}
        kept |= {f"param_groups[{number}][{key!r}]": value for key, value in settings.items()}
    return {name: _plain(value) for name, value in kept.items()}


def _plain(value: Any, depth: int = 4) -> Any:
    """Return a copy to compare of numbers, text, collections of them, and objects that hold them up to some `depth`; None for all
    else, such as buffers, which every step overwrites, and other optimizers."""
    if isinstance(value, Tensor):
        return repr(value.item()) if value.numel() == 1 else None
    if isinstance(value, Mapping):
        return [(_plain(key), _plain(each, depth)) for key, each in value.items()]
    if isinstance(value, Sequence | Set) and not isinstance(value, str):
        return [_plain(each, depth) for each in value]
    if depth and hasattr(value, "__dict__") and not isinstance(value, type | ModuleType | nn.Module | Optimizer):
        return _plain(vars(value), depth - 1)
    return repr(value) if isinstance(value, Number | str) else None  # text, since nan differs from itself


def _refuse_lost(before: Mapping[str, Any], after: Mapping[str, Any], spec: OptimizerSpec) -> None:
    """Raises UserError for values that steps change and no checkpoint holds: a trial's steps may be too few to show what they are
    for. What only the first step sets is a cache."""
    if changed := [name for name, value in after.items() if before.get(name) != value]:
        raise UserError(
            f"optim {spec.name}: steps change {', '.join(changed)}, which a checkpoint does not hold: keep everything that a step"
            " changes in self.state[parameter], a number as torch.tensor(0.0)"
        )


def _refuse_kept(
    optimizer: Optimizer, start: Mapping[str, Tensor], spec: OptimizerSpec, gradients: Sequence[Mapping[str, Tensor]]
) -> None:
    """Raises UserError for tensors outside the state that outlast a step, such as the slow weights of Lookahead, which steps read
    after more than those of the trial. What a step overwrites is none, nor what is the same whatever the weights were."""
    if not _tensors(optimizer):
        return
    negative, opposite = (
        [{name: -1.5 * value for name, value in each.items()} for each in them] for them in ((start,), gradients)
    )
    modules = [_Parameters({name: [value] for name, value in values.items()}) for values in (start, start, *negative)]
    optimizers = [_make(module, spec) for module in modules]
    for module, each, theirs in zip(modules, optimizers, (gradients, gradients, opposite), strict=True):
        _steps(module, each, theirs, 0, 1)
    one, another, unlike = map(_tensors, optimizers)
    dependent = [name for name, value in one.items() if name not in unlike or not _same(value, unlike[name])]
    for value in map(another.__getitem__, dependent):
        value.copy_(~value if value.dtype is torch.bool else value + 1)
    for module, each in zip(modules[:2], optimizers, strict=False):
        _steps(module, each, gradients, 2)
    after, changed = _tensors(optimizers[0]), _tensors(optimizers[1])
    if kept := [name for name in dependent if name in after and not (name in changed and _same(after[name], changed[name]))]:
        raise UserError(
            f"optim {spec.name}: {', '.join(kept)} outlasts a step, and a checkpoint does not hold it: keep everything that later"
            " steps read in self.state[parameter]"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, nan included."""
    return one.shape == other.shape and torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))


def _tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return tensors of several elements that an optimizer keeps outside its state, but for views of that or of parameters."""
    found, saved = dict[str, Tensor](), [each for group in optimizer.param_groups for each in group["params"]]
    saved += [each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)]
    known = {each.untyped_storage().data_ptr() for each in saved}

    def search(name: str, value: Any, depth: int = 4) -> None:
        if isinstance(value, Tensor):
            if value.numel() > 1 and value.untyped_storage().data_ptr() not in known:
                found[name] = value.detach()
        elif isinstance(value, Mapping):
            for number, each in enumerate(value.values()):
                search(f"{name}[{number}]", each, depth)
        elif isinstance(value, Sequence | Set) and not isinstance(value, str):
            for number, each in enumerate(value):
                search(f"{name}[{number}]", each, depth)
        elif depth and hasattr(value, "__dict__") and not isinstance(value, type | ModuleType | nn.Module | Optimizer):
            for attribute, each in vars(value).items():
                search(f"{name}.{attribute}", each, depth - 1)

    for name, value in vars(optimizer).items():
        if name not in ("state", "param_groups", "defaults"):
            search(f"self.{name}", value)
    return found


def _resumed(
    values: Mapping[str, Tensor], state: bytes, spec: OptimizerSpec, gradients: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the parameters after the last step, made by a new optimizer with the saved state."""
    module = _Parameters({name: [value.reshape(SHAPES[name])] for name, value in values.items()})
    optimizer = _make(module, spec)
    flat: Any = get_optimizer_state_dict(module, optimizer, options=FLAT)
    for name, value in load(state).items():
        if name in flat:
            flat[name].copy_(value)
    set_optimizer_state_dict(module, optimizer, flat, options=FLAT)
    _steps(module, optimizer, gradients, len(SCHEDULE) - 1)
    return module.whole()


def _refuse_idle(
    moved: Mapping[str, Tensor], start: Mapping[str, Tensor], at_one_rate: Mapping[str, Tensor], spec: OptimizerSpec
) -> None:
    """Raises UserError if steps leave a parameter as it was, or do not depend on the learning rates of the parameter groups."""
    for name, value in start.items():
        if torch.equal(moved[name], value.flatten()):
            raise UserError(
                f"optim {spec.name}: steps leave a parameter of shape {SHAPES[name]} as it was, though it has a gradient: step"
                " over all parameters of all groups"
            )
    if _equal(moved, at_one_rate):
        raise UserError(
            f"optim {spec.name}: the learning rate of its groups, which the schedule sets, changes nothing: read group['lr'] in"
            " each step"
        )


def _refuse_sharding(
    wanted: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    spec: OptimizerSpec,
    gradients: Sequence[Mapping[str, Tensor]],
    layout: Layout,
) -> None:
    """Raises UserError if the shards of a parameter are not updated as the whole one is."""

    def shard(value: Tensor) -> list[Tensor]:
        shards = [value[:SPLIT], value[SPLIT:]]
        return [each.flatten() for each in shards] if layout == "flat" else shards

    try:
        sharded = _after_all_steps(start, spec, gradients, shard)
        same = all(torch.allclose(sharded[name], value, rtol=0, atol=1e-3 * LR, equal_nan=True) for name, value in wanted.items())
    except Exception:  # it accepts no shards
        same = False
    if not same:
        raise UserError(
            f"optim {spec.name} needs whole parameters, and this launch shards parameters or optimizer state: launch with a DDP"
            " config such as launch/accelerate/cpu2.yaml, or choose optim=adamw"
        )


def _sizes(module: _Parameters, optimizer: Optimizer) -> dict[str, float]:
    flat = get_optimizer_state_dict(module, optimizer, options=FLAT)
    sizes = dict.fromkeys(SHAPES, 0.0)
    for name, value in flat.items():
        if isinstance(value, Tensor) and name.startswith("state."):
            kind = name.split(".")[2]
            sizes[kind] += value.nbytes / torch.Size(SHAPES[kind]).numel()
    return sizes
