"""What this process has of a parameter that several processes hold, whichever engine shared it out."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def shape_of(parameter: Tensor) -> torch.Size:
    """Of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def num_elements(parameter: Tensor) -> int:
    """Of the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_shard(parameter: Tensor) -> bool:
    """Whether other processes hold the rest of it."""
    return isinstance(parameter, DTensor) or parameter.numel() < num_elements(parameter)


def own_part(parameter: Any) -> Tensor:
    """What this process has of it, padding left out: all of it, or its shard."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    size = parameter.ds_tensor.numel()  # the last pieces are padded, with anything
    return parameter.ds_tensor[: max(0, min(size, parameter.ds_numel - size * dist.get_rank()))]


def offset_of(tensor: Tensor) -> list[int]:
    """Where in the whole tensor the block begins that this process has of it."""
    if not isinstance(tensor, DTensor):
        return [0] * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return list(offset)


def piece_of(parameter: Any, whole: Tensor) -> Tensor:
    """This process's piece of `whole`, as ZeRO-3 cut the parameter. The last pieces are padded with 0, where DeepSpeed itself
    would read on behind the end (0.19, safe_set_full_optimizer_state)."""
    size, rank = parameter.ds_tensor.numel(), dist.get_rank()
    padded = whole.new_zeros(size * dist.get_world_size())
    padded[: whole.numel()] = whole.flatten()
    return padded[size * rank : size * (rank + 1)]


def beside(parameter: Any, whole: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    """What this process has of a parameter, wherever that lies, each with the same part of `whole`."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        part = distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)
        return [(parameter.to_local().data, part.to_local())]
    if not hasattr(parameter, "ds_tensor"):
        return [(parameter.data, whole)]
    parts = [(parameter.ds_tensor.data, piece_of(parameter, whole))]
    return [*parts, (parameter.data, whole)] if parameter.data.shape == whole.shape else parts  # stage 3 keeps small ones whole
