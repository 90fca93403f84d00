"""A module under DeepSpeed's engine.

The engine keeps the optimizer, whose flat partitions the processes share out (stages 1 and 2), and the parameters with it
(stage 3). Everything leaves here whole and under the model's own names: a checkpoint does not tell what trained it.
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
from halos.distributed.parameters import beside, num_elements, piece_of, shape_of

AT_ONCE = 2**28  # elements of the optimizer's state in the host's memory at once while it is read: 1 GiB


class Zero(nn.Module):
    """`module` as DeepSpeed's engine calls it: what DDP and FSDP are to the loop, and the optimizer's step besides."""

    def __init__(self, engine: Any, groups: dict[str, int]) -> None:
        super().__init__()
        self.module: nn.Module = engine.module
        self._forward = self.module.forward
        self._form: TreeSpec | None = None
        self.module.forward = self._flat
        self.stage: int = engine.zero_optimization_stage()
        self._engines = (engine,)  # in a tuple, so that its parameters are not found twice
        self._groups = groups  # which of the optimizer's groups a parameter is in, by name

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's, around the one it was given; `param_groups` are shared."""
        return self._engines[0].optimizer

    def forward(self, batch: Any) -> Any:
        leaves = self._engines[0](batch)
        assert self._form is not None
        return tree_unflatten(leaves, self._form)

    def _flat(self, batch: Any) -> tuple[Tensor, ...]:
        """The module's own forward. The engine's hooks find tensors in tuples and dicts, and in nothing of ours."""
        leaves, self._form = tree_flatten(self._forward(batch))
        return tuple(leaves)

    def train(self, mode: bool = True) -> "Zero":
        self._engines[0].train(mode)
        return super().train(mode)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Gradients, averaged over the processes; `last` says that `update` comes next."""
        self._engines[0].set_gradient_accumulation_boundary(is_boundary=last)
        self._engines[0].backward(loss)

    def update(self) -> Tensor:
        """Clip, step, and forget the gradients; their norm before. Where it is not finite the engine makes no step."""
        engine = self._engines[0]
        engine.step()
        norm = torch.as_tensor(engine.get_global_grad_norm()).detach()
        norm = torch.where(norm < 0, torch.nan, norm)  # some of its versions say -1 of one that is not finite
        if not engine.was_step_applied():
            self._gather_persistent()
            return torch.full_like(norm, torch.nan)
        return norm

    def _gather_persistent(self) -> None:
        """Stage 3: what is meant to stay whole, the head among it, whole again, after the engine has let go of all parameters."""
        if self.stage == 3 and (kept := self.optimizer.persistent_parameters):
            kept[0].all_gather(kept)

    # --- whole tensors ---------------------------------------------------------------------------------------------------

    def gathered(self, *, trained_only: bool, offload: bool) -> dict[str, Tensor]:
        """Stage 3: copies of the whole state dict's tensors. With `offload` they go to the first process's host memory, and the
        others get none; else all have them where the model lies. Every process calls."""
        wanted, copies, found = dist.get_rank() == 0 or not offload, dict[int, Tensor](), dict[str, Tensor]()
        for name, value in self._each_whole(trained_only=trained_only):
            if wanted:
                if id(value) not in copies:  # tied parameters are one
                    copies[id(value)] = value.detach().to("cpu" if offload else value.device, copy=True)
                found[name] = copies[id(value)]
        return found

    def shares(self) -> dict[str, Tensor]:
        """Stage 3: copies of the whole state dict's tensors in the host's memory, each on one process. Every process calls."""
        sizes, seen, found = [0] * dist.get_world_size(), set[int](), dict[str, Tensor]()
        for name, value in self._each_whole(trained_only=False):
            if id(value) in seen:
                continue
            seen.add(id(value))
            holder = min(range(len(sizes)), key=sizes.__getitem__)
            sizes[holder] += value.numel()
            if holder == dist.get_rank():
                found[name] = value.detach().to("cpu", copy=True)
        return found

    def _each_whole(self, *, trained_only: bool) -> Iterator[tuple[str, Tensor]]:
        """The state dict's tensors, each whole while it is looked at."""
        # an evaluation ends with a forward pass, behind which the next layers are under way already
        self.optimizer.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()
        self._gather_persistent()  # let go of in a pass whose order of calls is new to the engine
        gather = package().zero.GatheredParameters
        whole = {id(parameter) for parameter in self.optimizer.persistent_parameters}
        for name, value in self.module.state_dict(keep_vars=True).items():
            if not trained_only or value.requires_grad:
                with gather([value] if hasattr(value, "ds_id") and id(value) not in whole else []):
                    yield name, value
                whole.add(id(value))  # of tied ones nobody looks at the second

    # --- the optimizer's state -------------------------------------------------------------------------------------------

    def _make_moments(self) -> None:
        """The optimizer's tensors at 0, as its first step would find them. DeepSpeed makes them at the first step, and of an
        optimizer with two groups then knows the first one's parameters only (0.19)."""
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
        """This process's flat pieces of the trained parameters, float32, each with its group's settings."""
        optimizer, groups = self.optimizer, self.optimizer.optimizer.param_groups
        if self.stage < 3:
            return list(zip(groups, optimizer.single_partition_of_fp32_groups, strict=True))
        flats = optimizer.fp32_partitioned_groups_flat
        return [(groups[optimizer.sub_group_to_group_id[number]], flat) for number, flat in enumerate(flats)]

    def _kinds(self) -> tuple[list[str], list[str]]:
        """What the optimizer keeps for each element, and what for each parameter: exp_avg, and step."""
        flat = self._partitions()[0][1]
        state = {key: value for key, value in self.optimizer.optimizer.state[flat].items() if isinstance(value, Tensor)}
        wide = [key for key, value in state.items() if value.shape == flat.shape]
        return wide, [key for key in state if key not in wide]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def settings(self) -> dict[str, Any]:
        """Each trained parameter's group, in the names of torch's flat optimizer state dict."""
        groups = self.optimizer.param_groups
        return {
            f"param_groups.{name}.{key}": value
            for name, number in self._groups.items()
            for key, value in groups[number].items()
            if key != "params"
        }

    def optimizer_state(self) -> dict[str, Any]:
        """As torch's flat optimizer state dict, settings on every process; of the tensors, which are whole and copies in the
        host's memory, each process holds its share. Every process calls."""
        whole_of = package().utils.safe_get_full_optimizer_state
        rank, shares = dist.get_rank(), [0] * dist.get_world_size()
        wide, scalar = self._kinds()
        once = self.optimizer.optimizer.state[self._partitions()[0][1]]
        found: dict[str, Any] = self.settings()
        for name, parameter in self._trained():
            holder = min(range(len(shares)), key=shares.__getitem__)
            shares[holder] += num_elements(parameter)
            for key in wide:
                value = whole_of(parameter, key)
                if holder == rank:
                    found[f"state.{name}.{key}"] = value.detach().cpu()  # put together for us, so ours
            if holder == rank:
                found |= {f"state.{name}.{key}": once[key].detach().to("cpu", copy=True) for key in scalar}
        return found

    def blanks(self) -> Iterator[dict[str, Tensor]]:
        """What `put` takes, a part after the other, to be read into."""
        wide, scalar = self._kinds()
        part, size = dict[str, Tensor](), 0
        for name, parameter in self._trained():
            part |= {f"state.{name}.{key}": torch.empty(shape_of(parameter)) for key in wide}
            part |= {f"state.{name}.{key}": torch.zeros(()) for key in scalar}
            size += len(wide) * num_elements(parameter)
            if size >= AT_ONCE:
                yield part
                part, size = {}, 0
        if part:
            yield part

    def put(self, part: dict[str, Tensor]) -> None:
        """Whole tensors of `blanks` become this process's piece of the optimizer's state."""
        utils = package().utils
        wide, scalar = self._kinds()
        for name, parameter in self._trained():
            for key in wide:
                if (value := part.get(f"state.{name}.{key}")) is None:
                    continue
                if self.stage == 3:
                    utils.safe_set_local_optimizer_state(parameter, piece_of(parameter, value), key)
                else:
                    utils.safe_set_full_optimizer_state(parameter, value, key)
            for key in scalar:
                for _, flat in self._partitions() if f"state.{name}.{key}" in part else ():
                    self.optimizer.optimizer.state[flat][key].copy_(part[f"state.{name}.{key}"])


def cut(module: nn.Module) -> None:
    """Stage 3: deal a module's parameters out from the first process, one after the other; the others' may be hollow."""
    package().zero.Init(module=module, config_dict_or_path=engine_config(None))


def blanks_of(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Whole tensors of a module that was `cut`, tied ones once, to be read into: a part after the other."""
    once = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    part, size = dict[str, Tensor](), 0
    for name, value in module.state_dict(keep_vars=True).items():
        if name in once:
            part[name] = torch.empty(shape_of(value), dtype=value.dtype)
            size += num_elements(value)
        if size >= AT_ONCE:
            yield part
            part, size = {}, 0
    if part:
        yield part


@torch.no_grad()
def put_weights(module: nn.Module, part: dict[str, Tensor]) -> None:
    """Whole tensors of `blanks_of` become this process's piece of the module."""
    state = module.state_dict(keep_vars=True)
    for name, whole in part.items():
        for mine, value in beside(state[name], whole):
            mine.copy_(value)


def engage(module: nn.Module, optimizer: Optimizer, *, max_grad_norm: float | None, head: nn.Module | None) -> Zero:
    """The module under an engine that keeps `optimizer`. `head`: a part that stays whole under stage 3 (`_unseen`)."""
    number_of = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    groups = {name: number_of[id(p)] for name, p in module.named_parameters() if p.requires_grad}
    with _unseen(head):
        engine, *_ = package().initialize(model=module, optimizer=optimizer, config=engine_config(max_grad_norm))
    made = Zero(engine, groups)
    if made.stage == 3:
        _keep_whole(engine.optimizer, head)
        _deal_out_buffers(engine.module)
    made._make_moments()
    return made


def engage_frozen(module: nn.Module, *, head: nn.Module | None) -> nn.Module:
    """A model that is not trained, cut by stage 3 like the one that is; `head` as for `engage`."""
    with _unseen(head):
        engine, *_ = package().initialize(model=module, config=engine_config(None))
    _keep_whole(engine.optimizer, head)
    _deal_out_buffers(engine.module)
    return Zero(engine, {})


@torch.no_grad()
def _deal_out_buffers(module: nn.Module) -> None:
    """Those that are saved with a model are read by the first process, like its parameters: the others' were computed as of a
    new one. DeepSpeed deals out parameters alone."""
    saved = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in saved:
            dist.broadcast(buffer, 0)


@contextmanager
def _unseen(head: nn.Module | None) -> Iterator[None]:
    """Keep the engine's hooks off a language model's head, which each process calls as often as its own tokens need.

    What a process gathers ahead and what it lets go, the engine learns from the order of the calls; where that is not the
    same on all processes, their collectives no longer meet.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    parts = list(head.modules()) if head is not None else []
    before = [{kind: OrderedDict(vars(part)[kind]) for kind in kinds} for part in parts]
    try:
        yield
    finally:
        for part, hooks in zip(parts, before, strict=True):
            vars(part).update(hooks)


def _keep_whole(optimizer: Any, head: nn.Module | None) -> None:
    """Have stage 3 keep a head's parameters gathered, renewed after every step."""
    parameters: list[Any] = list(head.parameters()) if head is not None else []
    some = [parameter for parameter in parameters if not parameter.ds_persist]
    for parameter in some:
        parameter.ds_persist = True
    optimizer.persistent_parameters.extend(some)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
