"""An optimizer tried on a few small parameters before any weights are read: whether it goes on from its saved state to the bit,
whether parameters may be shared out, and what it keeps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from halos.config.bind_optim import OptimizerSpec
from halos.errors import UserError
from halos.run.optimizer import over

SHAPES = {"hidden": (72, 130), "matrix": (66, 130), "vector": (130,)}  # too large for moments of 8 bits to stay whole, and uneven
LR = 0.01
CUT = 29  # rows of a matrix, or elements of a vector, that another process would have
SHARES = (0.5, 1.0, 0.25)  # of LR, in the steps that are made
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
Cut = Callable[[Tensor], list[Tensor]]
Layout = Literal["whole", "rows", "flat"]  # how the optimizer meets a parameter: as it is, its rows, or its elements in a line


class _Few(nn.Module):
    """Parameters, each of them in one piece or in several."""

    def __init__(self, values: Mapping[str, list[Tensor]]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {name: nn.ParameterList(nn.Parameter(piece.clone()) for piece in pieces) for name, pieces in values.items()}
        )

    def pieces(self, name: str) -> list[nn.Parameter]:
        return list(self.parts[name].parameters())

    def whole(self) -> dict[str, Tensor]:
        return {name: torch.cat([piece.detach().flatten() for piece in self.pieces(name)]) for name in self.parts}


def try_out(spec: OptimizerSpec, device: torch.device, layout: Layout) -> dict[str, float]:
    """What the optimizer keeps: bytes for an element of a hidden layer's matrix, of another matrix, of a vector. Raises UserError
    for one that would not do what a run promises of it."""
    spec = replace(spec, lr=LR, lr_by_name={}, loraplus_lr_ratio=None)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(0)
        start = {name: torch.randn(shape).to(device) for name, shape in SHAPES.items()}
        gradients = [{name: torch.randn(shape).to(device) for name, shape in SHAPES.items()} for _ in SHARES]
        try:
            module = _Few({name: [value] for name, value in start.items()})
            optimizer = _made(module, spec)
            _steps(module, optimizer, gradients, 0, 1)
            values, state = module.whole(), _saved(module, optimizer)
            _steps(module, optimizer, gradients, 2)
            again = _resumed(values, state, spec, gradients)
            undecayed = _walked(start, without := replace(spec, weight_decay=0.0), gradients)
        except UserError:
            raise
        except Exception as error:  # whatever an optimizer of anybody's raises
            told = " ".join(str(error).split())
            raise UserError(f"optim {spec.name} fails on small parameters: {type(error).__name__}: {told}") from error
        if not _equal(module.whole(), again):
            raise UserError(
                f"optim {spec.name} does not go on from its saved state to the bit, so no resume would be exact: what a step"
                " changes must be tensors of self.state[parameter], and nothing else"
            )
        if spec.weight_decay and _equal(module.whole(), undecayed):
            raise UserError(f"optim.weight_decay={spec.weight_decay:g}: {spec.name} decays nothing; leave it out")
        if layout != "whole":
            _refuse_shared_out(undecayed, start, without, gradients, layout)  # a flat piece does not show whether it decays
        return _sizes(module, optimizer)


def _made(module: _Few, spec: OptimizerSpec) -> Optimizer:
    return over(list(module.named_parameters()), spec, frozenset(module.pieces("hidden")))


def _steps(module: _Few, optimizer: Optimizer, gradients: Sequence[Mapping[str, Tensor]], *numbers: int) -> None:
    for number in numbers:
        for name in SHAPES:
            pieces = module.pieces(name)
            parts = gradients[number][name].flatten().split([piece.numel() for piece in pieces])
            for piece, part in zip(pieces, parts, strict=True):
                piece.grad = part.reshape(piece.shape).clone()
        for group in optimizer.param_groups:
            group["lr"] = LR * SHARES[number]
        torch.manual_seed(number)  # for one that draws: a run saves its generators
        optimizer.step()
        optimizer.zero_grad()


def _walked(
    start: Mapping[str, Tensor], spec: OptimizerSpec, gradients: Sequence[Mapping[str, Tensor]], cut: Cut | None = None
) -> dict[str, Tensor]:
    """The parameters behind all steps, each in one piece or as `cut`."""
    module = _Few({name: [value] if cut is None else cut(value) for name, value in start.items()})
    _steps(module, _made(module, spec), gradients, *range(len(SHARES)))
    return module.whole()


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """To the bit."""
    return all(torch.equal(value.view(torch.int32), other[name].view(torch.int32)) for name, value in one.items())


def _saved(module: _Few, optimizer: Optimizer) -> bytes:
    """The state as a checkpoint has it: tensors, in safetensors."""
    flat = get_optimizer_state_dict(module, optimizer, options=FLAT)
    state = {name: value for name, value in flat.items() if name.startswith("state.")}
    for name, value in state.items():
        if type(value) is not Tensor:
            what = name.rpartition(".")[2]
            raise UserError(
                f"optim: the optimizer keeps {what!r} of its state as {type(value).__name__}, which no checkpoint could hold:"
                " keep it in a plain tensor, a number in torch.tensor(0.0)"
            )
    return save({name: value.detach().contiguous() for name, value in state.items() if isinstance(value, Tensor)})


def _resumed(
    values: Mapping[str, Tensor], state: bytes, spec: OptimizerSpec, gradients: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The parameters behind the last step, by an optimizer that was made anew and given the saved state."""
    module = _Few({name: [value.reshape(SHAPES[name])] for name, value in values.items()})
    optimizer = _made(module, spec)
    flat: Any = get_optimizer_state_dict(module, optimizer, options=FLAT)
    for name, value in load(state).items():
        if name in flat:
            flat[name].copy_(value)
    set_optimizer_state_dict(module, optimizer, flat, options=FLAT)
    _steps(module, optimizer, gradients, len(SHARES) - 1)
    return module.whole()


def _refuse_shared_out(
    wanted: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    spec: OptimizerSpec,
    gradients: Sequence[Mapping[str, Tensor]],
    layout: Layout,
) -> None:
    """Raises UserError where a parameter in pieces does not move as the whole one does."""

    def cut(value: Tensor) -> list[Tensor]:
        pieces = [value[:CUT], value[CUT:]]
        return [piece.flatten() for piece in pieces] if layout == "flat" else pieces

    try:
        moved = _walked(start, spec, gradients, cut)
        same = all(torch.allclose(moved[name], value, rtol=0, atol=1e-3 * LR, equal_nan=True) for name, value in wanted.items())
    except Exception:  # it takes no pieces
        same = False
    if not same:
        raise UserError(
            f"optim {spec.name} needs each parameter as a whole, and this launch shares parameters or their state out among the"
            " processes: launch it with a DDP config such as launch/accelerate/cpu2.yaml, or choose optim=adamw"
        )


def _sizes(module: _Few, optimizer: Optimizer) -> dict[str, float]:
    flat = get_optimizer_state_dict(module, optimizer, options=FLAT)
    sizes = dict.fromkeys(SHAPES, 0.0)
    for name, value in flat.items():
        if isinstance(value, Tensor) and name.startswith("state."):
            kind = name.split(".")[2]
            sizes[kind] += value.nbytes / torch.Size(SHAPES[kind]).numel()
    return sizes
