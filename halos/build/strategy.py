"""How a model is spread over the processes: as it is, replicated (DDP), or sharded (FSDP2)."""

import warnings

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from halos.build.processes import asked_to_shard
from halos.errors import UserError


def distribute(module: nn.Module, made: Accelerator) -> nn.Module:
    """The module as this run's processes hold it. Make its optimizer afterwards, over the parameters it has then."""
    if asked_to_shard():
        return shard(module, made)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return module.to(made.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # accelerate knows no other name yet
        return made.prepare(module)


def shard(module: nn.Module, made: Accelerator) -> nn.Module:
    """FSDP2: a group for each layer of the model, and one for the rest, the head included.

    torch's own engine rather than accelerate's `prepare`, which shards on GPUs only, wants names of layer classes, and
    would turn a frozen bfloat16 base into float32. The accelerate config still says how (`fsdp_config`).
    """
    layers = [child for child in module.modules() if isinstance(child, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"FSDP: {type(module).__name__} has no layers to shard by; launch it with a DDP config")
    plugin = FullyShardedDataParallelPlugin()
    assert isinstance(plugin.cpu_offload, OffloadPolicy)
    mesh = init_device_mesh(made.device.type, (made.num_processes,))
    for part in (*layers, module):
        fully_shard(part, mesh=mesh, reshard_after_forward=bool(plugin.reshard_after_forward), offload_policy=plugin.cpu_offload)
    return module


def name_of(module: nn.Module) -> str:
    """What became of the module, for people."""
    if isinstance(module, FSDPModule):
        return "FSDP2"
    return "DDP" if isinstance(module, DistributedDataParallel) else "alone"
