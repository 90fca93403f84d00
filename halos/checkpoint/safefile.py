"""Safetensors one tensor at a time: a file opened by name, and one written as its tensors arrive."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafeFile:
    """Names, shapes and dtypes of a safetensors file; tensors are read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
            self._facts = {name: (DTYPES[part.get_dtype()], list(part.get_shape())) for name, part in slices.items()}

    @property
    def names(self) -> list[str]:
        return list(self._facts)

    def dtype(self, name: str) -> torch.dtype:
        return self._facts[name][0]

    def shape(self, name: str) -> list[int]:
        return self._facts[name][1]

    def read(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)


def write(path: Path, entries: dict[str, tuple[torch.dtype, list[int]]], tensors: Iterable[Tensor]) -> None:
    """A safetensors file of `entries` (name -> dtype, shape), whose tensors come in that order, one in memory at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in entries.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), tensor in zip(entries.items(), tensors, strict=True):
            assert (tensor.dtype, list(tensor.shape)) == (dtype, shape), f"{name} is not what the header says"
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
