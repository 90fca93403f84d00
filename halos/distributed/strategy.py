"""The interface to DDP, FSDP2 and DeepSpeed: how ranks hold a model, take a step, and read or load whole tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
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

from halos.distributed.agreement import require_same_on_all_ranks
from halos.distributed.parameters import local_pairs, local_part, move
from halos.logps.model import ModelWithHead

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

MakeOptimizer = Callable[[nn.Module], Optimizer]
Fill = Callable[[nn.Module], None]


class Strategy(ABC):
    """The operations on a distributed model for training, checkpoints and evaluations; each subclass has a file of its own.

    Methods with a `module` take the one that `wrap` returned, and are collective: every rank calls them. The defaults here are
    right for a module whose parameters are torch's own, plain tensors or DTensors.
    """

    is_sharded: ClassVar[bool] = False  # no rank has all parameters: forward passes and whole tensors need every rank
    supports_quantised: ClassVar[bool] = True  # a base quantised to 4 or 8 bits
    parameter_layout: ClassVar[Literal["whole", "rows", "flat"]] = "whole"  # what the optimizer gets of them
    optimizer_state_is_copied: ClassVar[bool] = False  # `optimizer_state` returns copies, not the optimizer's own tensors
    shards_are_copied: ClassVar[bool] = False  # `shards` returns copies, not the module's own tensors

    takes_trials: ClassVar[bool] = True  # a forward and backward pass that no step follows
    can_compile: ClassVar[bool] = True  # parts of a layer, which have their parameters when they are called

    launched_as: ClassVar[str] = "DDP"  # the name in accelerate's config
    needs_process_group: ClassVar[bool] = False  # even for one rank
    hidden_from_accelerate: ClassVar[tuple[str, ...]] = ()  # launcher variables that this strategy acts on in accelerate's place

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @classmethod
    @abstractmethod
    def is_requested(cls) -> bool:
        """Return whether the launcher's config requests this strategy."""

    @classmethod  # noqa: B027  most need nothing
    def check_launch(cls) -> None:
        """Raises UserError for a launcher config that this strategy cannot follow. Called before the ranks meet."""

    @classmethod
    def requests_bfloat16(cls) -> bool:
        """Return whether the strategy's own part of the launcher's config asks for bfloat16 compute."""
        return False

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in the log and in the record of an attempt."""

    @classmethod  # noqa: B027  most accept all
    def refuse_settings(cls, *, max_grad_norm: float | None, trained: str) -> None:
        """Raises UserError for unsupported settings. `trained`: the dtype that model.dtype requests for trained weights."""

    def refuse_model(self, model: nn.Module) -> None:  # noqa: B027  most accept all
        """Raises UserError for a model that cannot be distributed this way."""

    # --- holding a model -------------------------------------------------------------------------------------------------

    def wrap(
        self, module: ModelWithHead, optimizer_of: MakeOptimizer, *, max_grad_norm: float | None, fill: Fill | None = None
    ) -> tuple[nn.Module, Optimizer]:
        """Distribute the module over the ranks, and create the optimizer over its parameters with `optimizer_of`.

        With `fill` no rank has weights yet: it is called once memory for each rank's part is allocated, to `load_weights`.
        """
        self._broadcast_start(module)
        wrapped = self._distribute(module, fill)
        return wrapped, optimizer_of(wrapped)

    def wrap_frozen(self, module: ModelWithHead, fill: Fill | None = None) -> nn.Module:
        """Distribute a model that is not trained; `fill` as for `wrap`."""
        module.layout = self
        return self._distribute_frozen(module, fill)

    @abstractmethod
    def _distribute(self, module: ModelWithHead, fill: Fill | None) -> nn.Module: ...

    def _distribute_frozen(self, module: ModelWithHead, fill: Fill | None) -> nn.Module:
        if fill is not None:
            fill(module)
        return module.to(self.accelerator.device)

    def _broadcast_start(self, module: ModelWithHead) -> None:
        """Broadcast the trained tensors' start values from rank 0, which alone has weights where models are sharded."""
        module.layout = self
        module.base_values, module.reference_values = (
            {name: value.to(self.accelerator.device) for name, value in values.items()}
            for values in (module.base_values, module.reference_values)
        )
        if self.is_sharded and self.accelerator.num_processes > 1:
            for value in (*module.base_values.values(), *module.reference_values.values()):
                dist.broadcast(value, 0)

    def _require_same_tensors(self, module: nn.Module) -> None:
        values = module.state_dict().items()
        tensors = "\n".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in values)
        require_same_on_all_ranks(self.accelerator, "model", tensors)

    def parts(self, parameter: nn.Parameter, whole: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Pair each tensor in which this rank holds a part of `parameter` with the same part of `whole`."""
        return local_pairs(parameter, whole)

    def reshard(self, module: nn.Module) -> None:  # noqa: B027  most gather nothing
        """Free the parameters that were all-gathered for forward passes without a backward pass."""

    def move_frozen(self, frozen: nn.Module, module: nn.Module, weight: float) -> None:
        """Set the parameters of a model that `wrap_frozen` returned to `weight` of those of the trained `module`, and the rest of
        themselves. Both have the same names and shapes, and so the same shards."""
        self.reshard(frozen)
        source, target = (next(part for part in each.modules() if isinstance(part, ModelWithHead)) for each in (module, frozen))
        for name, parameter in target.named_parameters():
            move(local_part(parameter), local_part(source.get_parameter(name)), weight)

    def forward_dtypes(self, module: nn.Module) -> dict[str, torch.dtype]:
        """Return the dtypes in which forward passes get the parameters that they do not get as these are kept, by their names in
        the inner model."""
        return {}

    # --- a step ----------------------------------------------------------------------------------------------------------

    def accumulate(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Wrap every micro-batch of a step but the last: gradients need not be reduced yet."""
        return nullcontext()

    def backward(self, module: nn.Module, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of `loss`; after the `last` micro-batch they are averaged over the ranks."""
        self.accelerator.backward(loss)

    def clip(self, module: nn.Module, max_norm: float | None) -> Tensor:
        """Clip the gradients to `max_norm`, and return their norm before, a scalar that is the same on every rank."""
        return clip_grad_norm_(module.parameters(), max_norm or float("inf"))

    def step(self, optimizer: Optimizer) -> None:
        """Update the parameters. Called between `clip` and `zero_grad`, only if the norm is finite; DeepSpeed steps in `clip`."""
        optimizer.step()

    def zero_grad(self, optimizer: Optimizer) -> None:
        """Free the gradients."""
        optimizer.zero_grad()

    # --- whole tensors, and the optimizer's ------------------------------------------------------------------------------

    def gathered(self, module: nn.Module, *, trained_only: bool, offload: bool = True) -> dict[str, Tensor]:
        """Gather whole tensors, by their names in the inner model: on rank 0 in host memory, and an empty dict on other ranks.

        Without `offload` every rank gets them, on its device; a module that is not sharded returns its own tensors, not copies.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=offload, ignore_frozen_params=trained_only)
        state = get_model_state_dict(module, options=options)
        name_of: dict[int, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name in state and name_of.setdefault(id(parameter), name) != name:
                state[name] = state[name_of[id(parameter)]]  # tied parameters were gathered twice: keep one copy
        return of_model(state)

    def shards(self, module: nn.Module) -> dict[str, Any]:
        """Return what this rank writes into a checkpoint, by the names in the inner model, tied tensors once: DTensors, of which
        it writes its shard, or whole tensors that it writes for all ranks."""
        once = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        return of_model({name: value for name, value in get_model_state_dict(module).items() if name in once})

    def load_weights(self, module: nn.Module, read: Callable[[dict[str, Any]], None]) -> None:
        """Load weights that `read` writes in place into tensors with the names of `shards`; called inside `wrap`, before the
        optimizer is created."""
        read(self.shards(module))

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Return torch's flat optimizer state dict: this rank's shards of the tensors, and the parameter groups' settings."""
        return dict(get_optimizer_state_dict(module, optimizer, options=FLAT))

    def load_optimizer(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        refuse_others: Callable[[Set[str]], None],
        read: Callable[[dict[str, Tensor]], None],
    ) -> None:
        """Load optimizer tensors that `read` writes in place, whole or this rank's shards. Settings such as betas are not loaded:
        those of the config hold. `refuse_others` is called with the settings' names first."""
        flat = get_optimizer_state_dict(module, optimizer, options=FLAT)  # on a fresh optimizer this creates zero moments
        tensors: dict[str, Any] = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
        refuse_others(flat.keys() - tensors.keys())
        read(tensors)
        set_optimizer_state_dict(module, optimizer, {**flat, **tensors}, options=FLAT)


def of_model(state: dict[str, Any]) -> dict[str, Tensor]:
    """Rename a wrapped module's tensors to their names in the inner model."""
    return {name.removeprefix("model."): value for name, value in state.items() if isinstance(value, Tensor)}
