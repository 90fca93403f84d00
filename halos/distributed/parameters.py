"""This rank's part of a parameter, whether it is a plain tensor, a DTensor (FSDP2) or a ZeRO-3 parameter."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def shape_of(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def num_elements(parameter: Tensor) -> int:
    """Return the number of elements of the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_shard(parameter: Tensor) -> bool:
    """Return whether other ranks hold the rest of the parameter."""
    return isinstance(parameter, DTensor) or parameter.numel() < num_elements(parameter)


def local_part(parameter: Any) -> Tensor:
    """Return the whole parameter, or this rank's shard without padding."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    size = parameter.ds_tensor.numel()  # the last shards are padded with uninitialised values
    return parameter.ds_tensor[: max(0, min(size, parameter.ds_numel - size * dist.get_rank()))]


@torch.no_grad()
def move(target: Tensor, source: Tensor, weight: float) -> None:
    """Set `target`, in its dtype, to `weight` of `source` and the rest of itself; summed in float32."""
    target.copy_(source if weight == 1 else torch.lerp(target.float(), source.float(), weight))


def local_offset(tensor: Tensor) -> list[int]:
    """Return the offset of this rank's block in the whole tensor, one number per dimension."""
    if not isinstance(tensor, DTensor):
        return [0] * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return list(offset)


def zero3_shard_of(parameter: Any, whole: Tensor) -> Tensor:
    """Return this rank's shard of `whole`, as ZeRO-3 shards the parameter. The last shards are padded with 0, where DeepSpeed
    itself would read past the end (0.19, safe_set_full_optimizer_state)."""
    size, rank = parameter.ds_tensor.numel(), dist.get_rank()
    padded = whole.new_zeros(size * dist.get_world_size())
    padded[: whole.numel()] = whole.flatten()
    return padded[size * rank : size * (rank + 1)]


def local_pairs(parameter: Any, whole: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    """Pair each tensor in which this rank holds a part of the parameter with the same part of `whole`."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        part = distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)
        return [(parameter.to_local().data, part.to_local())]
    if not hasattr(parameter, "ds_tensor"):
        return [(parameter.data, whole)]
    parts = [(parameter.ds_tensor.data, zero3_shard_of(parameter, whole))]
    return [*parts, (parameter.data, whole)] if parameter.data.shape == whole.shape else parts  # it may be gathered as well
