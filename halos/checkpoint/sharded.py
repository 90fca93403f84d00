"""Sharded tensors as safetensors: each rank writes its own shards; any number of ranks reads them back, whole or sharded."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as load_sharded
from torch.distributed.checkpoint._hf_utils import DCP_SHARDING_INFO_KEY, DCP_VERSION_KEY, HF_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from halos.distributed.parameters import is_shard, local_offset, local_part
from halos.errors import UserError
from halos.merge import safetensors_io
from halos.merge.safetensors_io import Entry


def write(directory: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Each rank of `group` writes its shards; a tensor that several ranks hold whole is written by the lowest of them.

    The format is torch.distributed.checkpoint's, whose own writer holds two copies of all that it writes; this one holds none.
    """
    names, rank, offsets = _own_names(tensors, group), _rank(group), dict[str, list[int]]()
    directory.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name in names:
        local, offsets[name] = local_part(tensors[name]), local_offset(tensors[name])
        entries[name] = Entry(local.dtype, list(local.shape), partial(_block, local))
    facts = {name: {"saved_offsets": offset} for name, offset in offsets.items()}
    if entries:
        metadata = {DCP_SHARDING_INFO_KEY: json.dumps(facts), DCP_VERSION_KEY: str(HF_DCP_VERSION)}
        safetensors_io.write(directory / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", entries, metadata)


def _block(local: Tensor) -> Iterator[Tensor]:
    yield local.detach().cpu()


def _own_names(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> list[str]:
    """Return the names that this rank writes: its non-empty shards, and the whole tensors that no lower rank holds."""
    shards = [name for name, value in tensors.items() if is_shard(value) and local_part(value).numel()]
    whole = [name for name, value in tensors.items() if not is_shard(value)]
    if dist.is_initialized():
        by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(by_rank, whole, group=group)
        lower = {name for names in by_rank[: _rank(group)] for name in names}
        whole = [name for name in whole if name not in lower]
    return [name for name in tensors if name in {*shards, *whole}]


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def read(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read into `tensors`, which are whole or this rank's shards; every rank calls."""
    reader = _Reader(str(directory))
    reader.read_metadata()  # here, because torch would wrap its UserError in an error that nobody could catch
    load_sharded(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())


def shapes(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor, unsharded, by name."""
    facts = _Reader(str(directory)).read_metadata().state_dict_metadata
    return {name: (each.size, each.properties.dtype) for name, each in facts.items() if isinstance(each, TensorStorageMetadata)}


class _Reader(HuggingFaceStorageReader):
    """torch's reader without hidden files: it takes every *.safetensors, also the ._NAME.safetensors that macOS leaves."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        ls: Any = self.fs.ls
        self._metadata: Metadata | None = None  # read once, although torch asks for it again
        self.fs.ls = lambda path: [name for name in ls(path) if not Path(name).name.startswith(".")]

    def read_metadata(self) -> Metadata:
        """Raises UserError where the shards do not cover each tensor exactly once: torch would leave gaps uninitialised, and take
        either of two overlapping shards."""
        if self._metadata is not None:
            return self._metadata
        metadata = super().read_metadata()
        for name, each in metadata.state_dict_metadata.items():
            assert isinstance(each, TensorStorageMetadata)
            if (count := sum(shard.sizes.numel() for shard in each.chunks)) != each.size.numel():
                raise UserError(f"{self.path} is not whole: of {name} its files hold {count} numbers of {each.size.numel()}")
        self._metadata = metadata
        return metadata
