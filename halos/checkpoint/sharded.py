"""Tensors of which each process writes its own part: safetensors, read back whole or in parts by any number of processes."""

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
    """Every process of `group` writes what it has: its shards, or whole tensors, of which one that several have is written by the
    first. In torch.distributed.checkpoint's format, whose own writer holds two copies of all that it writes; this one none.
    """
    mine, rank, offsets = _own(tensors, group), _rank(group), dict[str, list[int]]()
    directory.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name in mine:
        local, offsets[name] = local_part(tensors[name]), local_offset(tensors[name])
        entries[name] = Entry(local.dtype, list(local.shape), partial(_block, local))
    facts = {name: {"saved_offsets": where} for name, where in offsets.items()}
    if entries:
        metadata = {DCP_SHARDING_INFO_KEY: json.dumps(facts), DCP_VERSION_KEY: str(HF_DCP_VERSION)}
        safetensors_io.write(directory / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", entries, metadata)


def _block(local: Tensor) -> Iterator[Tensor]:
    yield local.detach().cpu()


def _own(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> list[str]:
    """Names of what this process writes: every shard that holds something, and whole tensors that no process before it has."""
    shards = [name for name, value in tensors.items() if is_shard(value) and local_part(value).numel()]
    whole = [name for name, value in tensors.items() if not is_shard(value)]
    if dist.is_initialized():
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(everyone, whole, group=group)
        before = {name for names in everyone[: _rank(group)] for name in names}
        whole = [name for name in whole if name not in before]
    return [name for name in tensors if name in {*shards, *whole}]


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def read(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Into these, which are whole or this process's shards; every process calls."""
    reader = _Reader(str(directory))
    reader.read_metadata()  # here, since what torch makes of its errors nobody could catch
    load_sharded(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())


def shapes(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Of the whole tensors, by name."""
    facts = _Reader(str(directory)).read_metadata().state_dict_metadata
    return {name: (each.size, each.properties.dtype) for name, each in facts.items() if isinstance(each, TensorStorageMetadata)}


class _Reader(HuggingFaceStorageReader):
    """torch's own takes every *.safetensors, and so the ._NAME.safetensors that macOS leaves beside each file it copies."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        every: Any = self.fs.ls
        self._metadata: Metadata | None = None  # read once: torch asks for it again
        self.fs.ls = lambda path: [name for name in every(path) if not Path(name).name.startswith(".")]

    def read_metadata(self) -> Metadata:
        """Raises UserError where the files do not hold each number of a tensor once: torch would leave what none has as it finds
        it, and of what two have take either."""
        if self._metadata is not None:
            return self._metadata
        found = super().read_metadata()
        for name, each in found.state_dict_metadata.items():
            assert isinstance(each, TensorStorageMetadata)
            if (there := sum(part.sizes.numel() for part in each.chunks)) != each.size.numel():
                raise UserError(f"{self.path} is not whole: of {name} its files hold {there} numbers of {each.size.numel()}")
        self._metadata = found
        return found
