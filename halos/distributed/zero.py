"""A module under DeepSpeed's engine, and its state as whole tensors under the model's own names.

The engine owns the optimizer, whose flat partitions are sharded over the ranks (stages 1 and 2), and shards the parameters
(stage 3). A checkpoint does not depend on the strategy that trained it.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from halos.distributed.deepspeed_config import engine_config, package
from halos.distributed.parameters import num_elements, shape_of, zero3_shard_of
from halos.distributed.zero_weights import AT_ONCE


class Zero(nn.Module):
    """`module` wrapped by DeepSpeed's engine, as DDP wraps one; it also steps the optimizer."""

    def __init__(self, engine: Any, groups: dict[str, int]) -> None:
        super().__init__()
        self.module: nn.Module = engine.module
        self._forward = self.module.forward
        self._tree_spec: TreeSpec | None = None
        self.module.forward = self._flat_forward
        self.stage: int = engine.zero_optimization_stage()
        self._engines = (engine,)  # in a tuple, so that torch does not register its parameters a second time
        self._groups = groups  # the optimizer group of each parameter, by name

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer around ours; they share `param_groups`."""
        return self._engines[0].optimizer

    def forward(self, batch: Any) -> Any:
        leaves = self._engines[0](batch)
        assert self._tree_spec is not None
        return tree_unflatten(leaves, self._tree_spec)

    def _flat_forward(self, batch: Any) -> tuple[Tensor, ...]:
        """The module's own forward, flattened: the engine's hooks look for tensors in tuples and dicts, not in dataclasses."""
        leaves, self._tree_spec = tree_flatten(self._forward(batch))
        return tuple(leaves)

    def train(self, mode: bool = True) -> "Zero":
        self._engines[0].train(mode)
        return super().train(mode)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; after the `last` micro-batch they are averaged over the ranks and `update` comes next."""
        self._engines[0].set_gradient_accumulation_boundary(is_boundary=last)
        self._engines[0].backward(loss)

    def update(self) -> Tensor:
        """Clip the gradients, step and free them; return their norm before clipping: NaN where the engine did not step."""
        engine = self._engines[0]
        engine.step()
        norm = torch.as_tensor(engine.get_global_grad_norm()).detach()
        norm = torch.where(norm < 0, torch.nan, norm)  # some versions return -1 for a norm that is not finite
        if not engine.was_step_applied():
            self._gather_persistent()
            return torch.full_like(norm, torch.nan)
        return norm

    def _gather_persistent(self) -> None:
        """Stage 3: all-gather the persistent parameters, the head among them, after the engine has released all parameters."""
        if self.stage == 3 and (kept := self.optimizer.persistent_parameters):
            kept[0].all_gather(kept)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Stage 3: free what is gathered, so that shards may be changed, and gather the persistent parameters again."""
        self._offload.empty_partition_cache()
        try:
            yield
        finally:
            self._gather_persistent()

    @property
    def _offload(self) -> Any:
        """Stage 3: the owner of the shards. Of a model that is not trained it is in the optimizer's place."""
        return getattr(self.optimizer, "parameter_offload", self.optimizer)

    # --- whole tensors ---------------------------------------------------------------------------------------------------

    def gathered(self, *, trained_only: bool, offload: bool) -> dict[str, Tensor]:
        """Stage 3: copy the state dict's whole tensors, with `offload` into rank 0's host memory only, else onto every rank's
        device. Every rank calls."""
        wanted, copies, state = dist.get_rank() == 0 or not offload, dict[int, Tensor](), dict[str, Tensor]()
        for name, value in self._each_whole(trained_only=trained_only):
            if wanted:
                if id(value) not in copies:  # tied parameters share one copy
                    copies[id(value)] = value.detach().to("cpu" if offload else value.device, copy=True)
                state[name] = copies[id(value)]
        return state

    def whole_tensors(self) -> dict[str, Tensor]:
        """Stage 3: copy the state dict's whole tensors into host memory, each on one rank, balanced by size. Every rank calls."""
        sizes, seen, state = [0] * dist.get_world_size(), set[int](), dict[str, Tensor]()
        for name, value in self._each_whole(trained_only=False):
            if id(value) in seen:
                continue
            seen.add(id(value))
            holder = min(range(len(sizes)), key=sizes.__getitem__)
            sizes[holder] += value.numel()
            if holder == dist.get_rank():
                state[name] = value.detach().to("cpu", copy=True)
        return state

    def _each_whole(self, *, trained_only: bool) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the state dict's tensors, each gathered while it is the current one."""
        # an evaluation ends with a forward pass, after which the next layers are being prefetched
        self._offload.get_param_coordinator()._clean_inflight_param_registry()
        self._gather_persistent()  # released in a pass whose order of calls is new to the engine
        gather = package().zero.GatheredParameters
        whole = {id(parameter) for parameter in self.optimizer.persistent_parameters}
        for name, value in self.module.state_dict(keep_vars=True).items():
            if not trained_only or value.requires_grad:
                with gather([value] if hasattr(value, "ds_id") and id(value) not in whole else []):
                    yield name, value
                whole.add(id(value))  # of tied tensors nobody reads the second

    # --- the optimizer's state -------------------------------------------------------------------------------------------

    def _create_moments(self) -> None:
        """Create the optimizer's state at 0, as before the first step. DeepSpeed creates it at the first step, and then of an
        optimizer with two groups knows only the first group's parameters (0.19)."""
        inner = self.optimizer.optimizer
        groups = inner.param_groups
        for group, flat in self._partitions():
            inner.param_groups, before = [{**group, "params": [flat], "lr": 0.0}], flat.grad
            flat.grad = torch.zeros_like(flat)
            inner.step()
            flat.grad = before
            for value in inner.state[flat].values():
                if isinstance(value, Tensor):
                    value.zero_()
        inner.param_groups = groups
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Return this rank's flat float32 shards of the trained parameters, each with its group's settings."""
        optimizer, groups = self.optimizer, self.optimizer.optimizer.param_groups
        if self.stage < 3:
            return list(zip(groups, optimizer.single_partition_of_fp32_groups, strict=True))
        flats = optimizer.fp32_partitioned_groups_flat
        return [(groups[optimizer.sub_group_to_group_id[number]], flat) for number, flat in enumerate(flats)]

    def _state_names(self) -> tuple[list[str], list[str]]:
        """Return the names of the state that the optimizer keeps per element (exp_avg), and per parameter (step)."""
        flat = self._partitions()[0][1]
        state = {key: value for key, value in self.optimizer.optimizer.state[flat].items() if isinstance(value, Tensor)}
        per_element = [key for key, value in state.items() if value.shape == flat.shape]
        return per_element, [key for key in state if key not in per_element]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def settings(self) -> dict[str, Any]:
        """Return the settings of each trained parameter's group, named as in torch's flat optimizer state dict."""
        groups = self.optimizer.param_groups
        return {
            f"param_groups.{name}.{key}": value
            for name, number in self._groups.items()
            for key, value in groups[number].items()
            if key != "params"
        }

    def optimizer_state(self) -> dict[str, Any]:
        """Return torch's flat optimizer state dict: the settings on every rank, and whole tensors, copied into host memory, each
        on one rank. Every rank calls."""
        whole_of = package().utils.safe_get_full_optimizer_state
        rank, sizes = dist.get_rank(), [0] * dist.get_world_size()
        per_element, scalar = self._state_names()
        once = self.optimizer.optimizer.state[self._partitions()[0][1]]
        state: dict[str, Any] = self.settings()
        for name, parameter in self._trained():
            holder = min(range(len(sizes)), key=sizes.__getitem__)
            sizes[holder] += num_elements(parameter)
            for key in per_element:
                value = whole_of(parameter, key)
                if holder == rank:
                    state[f"state.{name}.{key}"] = value.detach().cpu()  # already a copy
            if holder == rank:
                state |= {f"state.{name}.{key}": once[key].detach().to("cpu", copy=True) for key in scalar}
        return state

    def empty_optimizer_state(self) -> Iterator[dict[str, Tensor]]:
        """Yield empty tensors for `load_optimizer_state`, in parts of about AT_ONCE elements, to be read into."""
        per_element, scalar = self._state_names()
        part, size = dict[str, Tensor](), 0
        for name, parameter in self._trained():
            part |= {f"state.{name}.{key}": torch.empty(shape_of(parameter)) for key in per_element}
            part |= {f"state.{name}.{key}": torch.zeros(()) for key in scalar}
            size += len(per_element) * num_elements(parameter)
            if size >= AT_ONCE:
                yield part
                part, size = {}, 0
        if part:
            yield part

    def load_optimizer_state(self, part: dict[str, Tensor]) -> None:
        """Load this rank's shard of the optimizer state from whole tensors of `empty_optimizer_state`."""
        utils = package().utils
        per_element, scalar = self._state_names()
        for name, parameter in self._trained():
            for key in per_element:
                if (value := part.get(f"state.{name}.{key}")) is None:
                    continue
                if self.stage == 3:
                    utils.safe_set_local_optimizer_state(parameter, zero3_shard_of(parameter, value), key)
                else:
                    utils.safe_set_full_optimizer_state(parameter, value, key)
            for key in scalar:
                for _, flat in self._partitions() if f"state.{name}.{key}" in part else ():
                    self.optimizer.optimizer.state[flat][key].copy_(part[f"state.{name}.{key}"])


def initialize(module: nn.Module, optimizer: Optimizer, *, max_grad_norm: float | None, head: nn.Module | None) -> Zero:
    """Create an engine for the module and its optimizer. `head`: a part that stays whole under stage 3 (`_without_hooks`)."""
    group_of = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    groups = {name: group_of[id(p)] for name, p in module.named_parameters() if p.requires_grad}
    with _without_hooks(head):
        engine, *_ = package().initialize(model=module, optimizer=optimizer, config=engine_config(max_grad_norm))
    zero = Zero(engine, groups)
    if zero.stage == 3:
        _keep_gathered(engine.optimizer, head)
        _broadcast_buffers(engine.module)
    zero._create_moments()
    return zero


def initialize_frozen(module: nn.Module, *, head: nn.Module | None) -> nn.Module:
    """Create an engine for a model that is not trained, sharded by stage 3; `head` as for `initialize`."""
    with _without_hooks(head):
        engine, *_ = package().initialize(model=module, config=engine_config(None))
    _keep_gathered(engine.optimizer, head)
    _broadcast_buffers(engine.module)
    return Zero(engine, {})


@torch.no_grad()
def _broadcast_buffers(module: nn.Module) -> None:
    """Broadcast the buffers that are saved with the model: rank 0 has read them, the other ranks have those of a new model.
    DeepSpeed broadcasts parameters only."""
    saved = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in saved:
            dist.broadcast(buffer, 0)


@contextmanager
def _without_hooks(head: nn.Module | None) -> Iterator[None]:
    """Remove the engine's hooks from a language model's head, which each rank calls as often as its own tokens need.

    ZeRO-3 learns its prefetch order from the order of calls; ranks that call the head a different number of times deadlock.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    parts = list(head.modules()) if head is not None else []
    before = [{kind: OrderedDict(vars(part)[kind]) for kind in kinds} for part in parts]
    try:
        yield
    finally:
        for part, hooks in zip(parts, before, strict=True):
            vars(part).update(hooks)


def _keep_gathered(optimizer: Any, head: nn.Module | None) -> None:
    """Have stage 3 keep a head's parameters gathered, and gather them again after every step."""
    parameters: list[Any] = list(head.parameters()) if head is not None else []
    sharded = [parameter for parameter in parameters if not parameter.ds_persist]
    for parameter in sharded:
        parameter.ds_persist = True
    optimizer.persistent_parameters.extend(sharded)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
