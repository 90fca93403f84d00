"""How a model is spread over the processes: as it is, replicated (DDP), or sharded (FSDP2)."""

import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from halos.build.processes import agree, asked_to_shard
from halos.errors import UserError


def distribute(module: nn.Module, made: Accelerator) -> nn.Module:
    """The module as this run's processes hold it. Make its optimizer afterwards, over the parameters it has then."""
    if asked_to_shard():
        return shard(module, made)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return module.to(made.device)
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
    layers = [child for child in module.modules() if isinstance(child, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"FSDP: {type(module).__name__} has no layers to shard by; launch it with a DDP config")
    plugin = FullyShardedDataParallelPlugin()
    assert isinstance(plugin.cpu_offload, OffloadPolicy)
    whole = module.state_dict()
    agree(made, "model", "\n".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in whole.items()))
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


def name_of(module: nn.Module) -> str:
    """What became of the module, for people."""
    if isinstance(module, FSDPModule):
        return "FSDP2"
    return "DDP" if isinstance(module, DistributedDataParallel) else "alone"
