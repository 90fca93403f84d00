"""Read and write safetensors a block of rows at a time: no file is mapped, and shards are written as blocks arrive."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halos import confined
from halos.errors import UserError, one_line, user_errors

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 2**20  # elements in a block: 8 MiB of float64
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
SHARD = 5 * 10**9  # bytes, the default of the hub
INDEX = "model.safetensors.index.json"


class SafeFile:
    """A safetensors file. What is read is copied, so that no page of the file stays in memory.

    Raises UserError if the file is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with user_errors(f"{path} cannot be read as safetensors"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"its header has {length} bytes, and safetensors allows at most {MAX_HEADER}")
            header = json.loads(file.read(length)) if length < path.stat().st_size else {}
            header.pop("__metadata__", None)
            self._facts = {name: _facts(name, facts) for name, facts in header.items()}
        self._data = 8 + length
        end = max((offsets[1] for _, _, offsets in self._facts.values()), default=0)
        if path.stat().st_size != self._data + end:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, and its header describes {self._data + end}: it is not whole"
            )

    @property
    def names(self) -> list[str]:
        return list(self._facts)

    def dtype(self, name: str) -> torch.dtype:
        return self._facts[name][0]

    def shape(self, name: str) -> list[int]:
        return self._facts[name][1]

    def read(self, name: str) -> Tensor:
        dtype, shape, (start, end) = self._facts[name]
        return self._bytes(start, end).view(dtype).reshape(shape)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows `first` to `last` of a tensor of one dimension or more."""
        dtype, shape, (start, _) = self._facts[name]
        width = math.prod(shape[1:]) * dtype.itemsize
        return self._bytes(start + first * width, start + last * width).view(dtype).reshape(last - first, *shape[1:])

    def _bytes(self, start: int, end: int) -> Tensor:
        buffer = torch.empty(end - start, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._data + start)
            view, done = buffer.numpy().data, 0
            while done < end - start and (count := file.readinto(view[done:])):
                done += count
        assert done == end - start, f"{self.path} became shorter while it was read"
        return buffer


def _facts(name: str, facts: Any) -> tuple[torch.dtype, list[int], list[int]]:
    """Return dtype, shape and offsets of a tensor from the header. Raises ValueError if they are invalid."""
    dtype, shape, offsets = DTYPES[facts["dtype"]], facts["shape"], facts["data_offsets"]
    valid = all(type(number) is int and 0 <= number < 2**48 for number in [*shape, *offsets]) and len(offsets) == 2
    if not valid or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the header has a wrong shape or wrong offsets for {one_line(name)}")
    return dtype, shape, offsets


def spans(shape: list[int]) -> list[tuple[int, int]]:
    """Split the rows of a tensor into blocks of at most about BLOCK elements: (first, last) of each."""
    if not shape:
        return [(0, 0)]
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    return [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def blocks(file: SafeFile, name: str) -> Iterator[Tensor]:
    """Yield a tensor's rows in order, block by block."""
    if not file.shape(name):
        yield file.read(name)
        return
    for first, last in spans(file.shape(name)):
        yield file.rows(name, first, last)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written, whose blocks are computed when its turn comes."""

    dtype: torch.dtype
    shape: list[int]
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Return the bytes that precede the tensors, and the number of bytes of the tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, entry in entries.items():
        header[name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, offset + entry.size]}
        offset += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text, offset


def write_empty(path: Path, shapes: Mapping[str, list[int]]) -> None:
    """Write a sparse file of float32 tensors that has names and shapes but takes no space for their values."""
    header, size = _header({name: Entry(torch.float32, shape, lambda: iter(())) for name, shape in shapes.items()}, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def write(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with one block in memory at a time."""
    header, _ = _header(entries, metadata or {})
    with path.open("wb") as file:
        file.write(header)
        for name, entry in entries.items():
            size = 0
            for block in entry.blocks():
                raw = block.to(entry.dtype).contiguous().reshape(-1).view(torch.uint8)
                file.write(raw.numpy().data)
                size += len(raw)
            assert size == entry.size, f"{name} is not what the header says"


def write_sharded(directory: Path, entries: Mapping[str, Entry], limit: int = SHARD) -> None:
    """Write model.safetensors, or shards of at most `limit` bytes (or one tensor) with the index that from_pretrained reads."""
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        if shards[-1] and sum(each.size for each in shards[-1].values()) + entry.size > limit:
            shards.append({})
        shards[-1][name] = entry
    if len(shards) == 1:
        write(directory / "model.safetensors", entries)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write(directory / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(entry.size for entry in entries.values())}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=1))


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor from an index. Raises UserError if there are none, or one is in another directory."""
    weight_map = confined.load_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for part in weight_map.values():
        if not isinstance(part, str) or part in ("", ".", "..") or "/" in part or "\\" in part or "\0" in part:
            raise UserError(f"{index} names {one_line(part)} as a part of its weights, which is no file next to it")
    return weight_map


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of the model in `directory`. Raises UserError if there are none, or one is missing."""
    index = directory / INDEX
    if (directory / "model.safetensors").is_file():  # from_pretrained prefers it to an index
        names = ["model.safetensors"]
    elif index.is_file():
        names = sorted(set(read_weight_map(index).values()))
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors") if not path.name.startswith("."))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} lacks {len(missing)} of {len(names)} parts of its weights, {missing[0]} for one")
    if not names and any(directory.glob("*.bin")):
        raise UserError(
            f"{directory} has its weights in pickled files (*.bin), and nothing is unpickled here: convert them first"
        )
    if not names:
        raise UserError(f"{directory} holds no weights (*.safetensors)")
    return [directory / name for name in names]


def parse_size(text: str) -> int:
    """Parse `5GB` or `200MB` in decimal units, as the hub counts them. Raises UserError."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        number = text.upper().removesuffix(unit)
        if number != text.upper() and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return int(float(number) * scale)
    raise UserError(f"'{text}' is no size: write a number and a unit, such as 5GB or 200MB")
