"""How the processes of a run hold a model, and all in which that shows. Each engine is a subclass, in a file of its own."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from halos.distributed.launch import agree
from halos.distributed.parameters import beside
from halos.logps.model import Reader

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

MakeOptimizer = Callable[[nn.Module], Optimizer]
Fill = Callable[[nn.Module], None]


class Strategy(ABC):
    """What the loop, saves and evaluations ask of an engine. Methods with `module` take what `wrap` gave, and all processes
    call them together. What stands here is right for a module whose parameters are torch's own, whole or DTensors."""

    is_sharded: ClassVar[bool] = False  # no process has all parameters: a forward pass, or whole tensors, take every process
    takes_quantised: ClassVar[bool] = True  # a base of 4 or 8 bits
    optimizer_meets: ClassVar[Literal["whole", "rows", "flat"]] = "whole"  # parameters, their rows, or elements in a line
    optimizer_state_is_copied: ClassVar[bool] = False  # `optimizer_state` gives copies, and not the optimizer's own tensors
    shards_are_copied: ClassVar[bool] = False  # `shards` gives copies, and not the module's own tensors

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @classmethod
    @abstractmethod
    def is_asked(cls) -> bool:
        """Whether the launcher's config asks for this engine."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For people."""

    @classmethod  # noqa: B027  most take all
    def refuse_settings(cls, *, max_grad_norm: float | None, trained: str) -> None:
        """Raises UserError for what this engine cannot do. `trained`: the dtype that model.dtype asks of trained weights."""

    def refuse_model(self, model: nn.Module) -> None:  # noqa: B027  most take all
        """Raises UserError for a model that cannot be held this way."""

    # --- holding a model -------------------------------------------------------------------------------------------------

    def wrap(
        self, module: Reader, optimizer_of: MakeOptimizer, *, max_grad_norm: float | None, fill: Fill | None = None
    ) -> tuple[nn.Module, Optimizer]:
        """The module as this run's processes hold it, and the optimizer that `optimizer_of` makes over its parameters then.

        Where `fill` is given no process has weights yet: it is called once each has room for its part, to `load_weights`.
        """
        self._share_start(module)
        wrapped = self._hold(module, fill)
        return wrapped, optimizer_of(wrapped)

    def wrap_frozen(self, module: Reader) -> nn.Module:
        """A model that is not trained, as this run's processes hold it."""
        module.layout = self
        return self._hold_frozen(module)

    @abstractmethod
    def _hold(self, module: Reader, fill: Fill | None) -> nn.Module: ...

    def _hold_frozen(self, module: Reader) -> nn.Module:
        return module.to(self.accelerator.device)

    def _share_start(self, module: Reader) -> None:
        """What was trained is known as it was at the start where weights are: on the first process, where models are sharded."""
        module.layout = self
        if self.is_sharded and self.accelerator.num_processes > 1:
            module.start, module.beginning = (
                {name: value.to(self.accelerator.device) for name, value in values.items()}
                for values in (module.start, module.beginning)
            )
            for value in (*module.start.values(), *module.beginning.values()):
                dist.broadcast(value, 0)

    def _agree_on_tensors(self, module: nn.Module) -> None:
        values = module.state_dict().items()
        agree(self.accelerator, "model", "\n".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in values))

    def parts(self, parameter: nn.Parameter, whole: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """What this process has of a parameter, each with the same part of `whole`."""
        return beside(parameter, whole)

    def reshard(self, module: nn.Module) -> None:  # noqa: B027  most keep what they have
        """After forward passes that no backward follows: let go of what was gathered for them."""

    # --- a step ----------------------------------------------------------------------------------------------------------

    def accumulate(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Around a micro-batch behind which others of its step come: gradients are not reduced yet, where that saves work."""
        return nullcontext()

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        """Gradients of `loss`, averaged over the processes once `last`."""
        self.accelerator.backward(loss)

    def clip(self, module: nn.Module, most: float | None) -> Tensor:
        """Clip the gradients to the norm `most`; the norm that they had, a scalar: the same on every process."""
        return clip_grad_norm_(module.parameters(), most or float("inf"))

    def step(self, optimizer: Optimizer) -> None:
        """Move the parameters. Called between `clip` and `forget`, for a step whose norm was finite alone."""
        optimizer.step()

    def forget(self, optimizer: Optimizer) -> None:
        """The gradients."""
        optimizer.zero_grad()

    # --- whole tensors, and the optimizer's ------------------------------------------------------------------------------

    def gathered(self, module: nn.Module, *, trained_only: bool, offload: bool = True) -> dict[str, Tensor]:
        """Whole tensors under the names of the model inside; every process calls, the first one gets.

        Without `offload` every process gets them where they lie; a module that is not sharded gives its own, not copies.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=offload, ignore_frozen_params=trained_only)
        state = get_model_state_dict(module, options=options)
        first: dict[int, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name in state and first.setdefault(id(parameter), name) != name:
                state[name] = state[first[id(parameter)]]  # tied parameters that were gathered twice are one
        return of_model(state)

    def shards(self, module: nn.Module) -> dict[str, Any]:
        """By the names of the model inside, tied tensors once: what this process writes of them. DTensors, which stand for its
        shards, or whole tensors that it writes for all."""
        once = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        return of_model({name: value for name, value in get_model_state_dict(module).items() if name in once})

    def load_weights(self, module: nn.Module, read: Callable[[dict[str, Any]], None]) -> None:
        """Tensors that `read` fills in place, under the names that `shards` gave, become the weights of a module that `wrap`
        is about to hand to its optimizer."""
        read(self.shards(module))

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """By name: tensors, each process's own shards of them, and a parameter group's settings."""
        return dict(get_optimizer_state_dict(module, optimizer, options=FLAT))

    def load_optimizer(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        refuse_others: Callable[[Set[str]], None],
        read: Callable[[dict[str, Tensor]], None],
    ) -> None:
        """Tensors that `read` fills in place, whole or this process's shards, become the optimizer's, which keeps its own
        settings: what the config says now holds. `refuse_others` is shown the settings' names before."""
        flat = get_optimizer_state_dict(module, optimizer, options=FLAT)  # on a fresh optimizer this makes zero moments
        tensors: dict[str, Any] = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
        refuse_others(flat.keys() - tensors.keys())
        read(tensors)
        set_optimizer_state_dict(module, optimizer, {**flat, **tensors}, options=FLAT)


def of_model(state: dict[str, Any]) -> dict[str, Tensor]:
    """A wrapped module's tensors under the names of the model inside."""
    return {name.removeprefix("model."): value for name, value in state.items() if isinstance(value, Tensor)}
