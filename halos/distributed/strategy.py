"""How a model is spread over the processes: as it is, replicated (DDP), or sharded (FSDP2, DeepSpeed's ZeRO)."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from halos.distributed.deepspeed import Zero, cut, engage, engage_frozen, own_piece, piece_of
from halos.distributed.deepspeed_config import cut_asked, deepspeed_asked, stage_asked
from halos.distributed.launch import agree, asked_to_cut, asked_to_shard
from halos.errors import UserError
from halos.logps.hidden import backbone_of
from halos.logps.model import ActorCritic, LanguageModel, Reader, bare


def asked(made: Accelerator) -> str:
    """What the launcher's config asks for, for people: `alone` for one process that is given the whole model."""
    if deepspeed_asked():
        return f"DeepSpeed ZeRO-{stage_asked()}"
    return "FSDP2" if asked_to_shard() else "DDP" if made.num_processes > 1 else "alone"


def refuse_whole(module: nn.Module) -> None:
    """Raises UserError where FSDP is asked for and the model has no layers that could be sharded."""
    if asked_to_shard() and not _layers(module):
        raise UserError(f"FSDP: {type(bare(module)).__name__} has no layers to shard by; launch it with a DDP config")


def _layers(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if isinstance(child, GradientCheckpointingLayer)]


def distribute(
    module: nn.Module, made: Accelerator, optimizer_of: Callable[[nn.Module], Optimizer], *, max_grad_norm: float | None
) -> tuple[nn.Module, Optimizer]:
    """The module as this run's processes hold it, and the optimizer that `optimizer_of` makes over the parameters it has then."""
    _call_layers_alike(module)
    _share_start(module, made)
    if not deepspeed_asked():
        spread = shard(module, made) if asked_to_shard() else _replicate(module, made)
        return spread, optimizer_of(spread)
    _agree_on_tensors(module, made)
    if cut_asked():
        cut(module)
    engaged = engage(module.to(made.device), optimizer_of(module), max_grad_norm=max_grad_norm, head=_head(module))
    return engaged, engaged.optimizer


def distribute_frozen(module: nn.Module, made: Accelerator) -> nn.Module:
    """A model that is not trained, as this run's processes hold it."""
    _call_layers_alike(module)
    if asked_to_shard():
        return shard(module, made)
    if not cut_asked():
        return module.to(made.device)
    _agree_on_tensors(module, made)
    cut(module)
    return engage_frozen(module, head=_head(module))


def _call_layers_alike(module: nn.Module) -> None:
    """Sharded layers are gathered when they are called, so where rows go through them one by one, all processes call them
    equally often."""
    assert isinstance(module, Reader)
    module.everywhere = asked_to_cut()


def _share_start(module: nn.Module, made: Accelerator) -> None:
    """What was trained is known as it was at the start where weights are: on the first process, where models are sharded."""
    assert isinstance(module, Reader)
    module.held = _held
    if asked_to_cut() and made.num_processes > 1:
        module.start, module.beginning = (
            {name: value.to(made.device) for name, value in values.items()} for values in (module.start, module.beginning)
        )
        for value in (*module.start.values(), *module.beginning.values()):
            dist.broadcast(value, 0)


def _held(parameter: Any, start: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What this process has of a parameter, wherever that lies, and the same part of its value at the start."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        part = distribute_tensor(start.to(parameter.device), mesh, placements, src_data_rank=None)
        return [(parameter.to_local().data, part.to_local())]
    if not hasattr(parameter, "ds_tensor"):
        return [(parameter.data, start)]
    parts = [(parameter.ds_tensor.data, piece_of(parameter, start))]
    return [*parts, (parameter.data, start)] if parameter.data.shape == start.shape else parts  # stage 3 keeps small ones whole


def _head(module: nn.Module) -> nn.Module | None:
    """What of a language model is called as often as its scored tokens need: its last layer, or all above its backbone."""
    if not isinstance(module, LanguageModel | ActorCritic):
        return None
    inner = bare(module.model)
    if module.plan.head == "layer":
        layer = inner.get_output_embeddings()
        assert isinstance(layer, nn.Module), "the plan has used it"
        return layer
    backbone = backbone_of(inner) if module.plan.head == "own" else inner
    return nn.ModuleList(part for part in inner.children() if part is not backbone)


def _replicate(module: nn.Module, made: Accelerator) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # accelerate knows no other name yet
        prepared = made.prepare(module)
    if made.num_processes > 1 and name_of(prepared) != "DDP":
        raise UserError(
            f"{made.num_processes} processes were launched, and accelerate made a model that is {name_of(prepared)}: gradients"
            " would not be shared. Use one of launch/accelerate/*.yaml"
        )
    return prepared


def shard(module: nn.Module, made: Accelerator) -> nn.Module:
    """FSDP2: a group for each layer of the model, and one for the rest, the head included.

    torch's own engine rather than accelerate's `prepare`, which shards on GPUs only, wants names of layer classes, and
    would turn a frozen bfloat16 base into float32. The accelerate config still says how (`fsdp_config`). The first process
    has the whole model in its host's memory, and deals it out a tensor at a time; the others' are hollow until then.
    """
    layers = _layers(module)
    assert layers, "refuse_whole came before"
    plugin = FullyShardedDataParallelPlugin()
    assert isinstance(plugin.cpu_offload, OffloadPolicy)
    whole = module.state_dict()
    _agree_on_tensors(module, made)
    mesh = init_device_mesh(made.device.type, (made.num_processes,))
    for part in (*layers, module):
        fully_shard(
            part,
            mesh=mesh,
            reshard_after_forward=bool(plugin.reshard_after_forward),
            offload_policy=plugin.cpu_offload,
            mp_policy=_precision(made) if part is not module else MixedPrecisionPolicy(),
        )
    if made.num_processes > 1:
        _deal_out(module, whole if made.is_main_process else {})
    return module


def _agree_on_tensors(module: nn.Module, made: Accelerator) -> None:
    values = module.state_dict().items()
    agree(made, "model", "\n".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in values))


def _precision(made: Accelerator) -> MixedPrecisionPolicy:
    """Layers gather their parameters as autocast would use them, in half the bytes; gradients are summed in float32.

    Activations stay what autocast makes of them, so that a sharded step is a replicated one up to the rounding of norms. The
    rest of the model, embeddings and head, keeps float32: scores are compared.
    """
    if made.mixed_precision != "bf16":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _deal_out(module: nn.Module, whole: dict[str, Any]) -> None:
    """The first process's `whole` tensors become every process's shards."""
    set_model_state_dict(module, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def own_part(parameter: nn.Parameter) -> Tensor:
    """What this process has of a parameter, padding left out: all of it, or its shard."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return own_piece(parameter) if hasattr(parameter, "ds_tensor") else parameter


def name_of(module: nn.Module) -> str:
    """What became of the module, for people."""
    if isinstance(module, FSDPModule):
        return "FSDP2"
    if isinstance(module, Zero):
        return f"DeepSpeed ZeRO-{module.stage}"
    return "DDP" if isinstance(module, DistributedDataParallel) else "alone"
