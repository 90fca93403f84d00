"""The weights of a module that ZeRO 3 shards: how they are sharded, and loaded from whole tensors."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from halos.distributed.deepspeed_config import engine_config, package
from halos.distributed.parameters import local_pairs, num_elements, shape_of

AT_ONCE = 2**28  # elements in host memory at once while state is read: 1 GiB


def shard(module: nn.Module) -> None:
    """Stage 3: shard a module's parameters, broadcast from rank 0 one after the other; the other ranks' may be empty."""
    package().zero.Init(module=module, config_dict_or_path=engine_config(None))


def empty_weights(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield empty whole tensors for the weights of a sharded module, tied ones once, in parts of about AT_ONCE elements."""
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
def load_weights(module: nn.Module, part: dict[str, Tensor]) -> None:
    """Load this rank's shards of the module from whole tensors of `empty_weights`."""
    state = module.state_dict(keep_vars=True)
    for name, whole in part.items():
        for local, value in local_pairs(state[name], whole):
            local.copy_(value)
