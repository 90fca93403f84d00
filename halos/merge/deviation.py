"""How far the tensors of a merged model on the disk deviate from what they must be."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halos.merge.expected import ExpectedTensor
from halos.merge.safetensors_io import INDEX, SafeFile, spans, weight_files

NOISE = 1e-13  # of a tensor's largest value: float64 products of a few dozen terms, summed in another order
THROUGH = torch.finfo(torch.float32).eps / 2  # a conversion from float64 to a half type rounds to float32 first


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far a tensor on the disk is from the expected one."""

    name: str
    error: float  # the largest difference over the largest value
    allowed: float  # the largest difference as a fraction of what rounding explains; above 1 it is wrong


def compare(merged: Path, expected: Mapping[str, ExpectedTensor], dtype: torch.dtype | None) -> tuple[list[Deviation], list[str]]:
    """Return the deviation of each tensor of `merged`, the worst first; and all faults of files, names, shapes and dtypes."""
    faults, files = [], {}
    for path in weight_files(merged):
        file = SafeFile(path)
        files |= {name: file for name in file.names}
    faults += [f"{name} is missing" for name in sorted(expected.keys() - files.keys())]
    faults += [f"{name} does not belong there" for name in sorted(files.keys() - expected.keys())]
    faults += _index_faults(merged, files)
    deviations = []
    for name in sorted(expected.keys() & files.keys()):
        tensor, file = expected[name], files[name]
        kind = torch.float32 if dtype in tensor.float32_in else dtype
        if file.shape(name) != tensor.shape:
            faults.append(f"{name} is {file.shape(name)} instead of {tensor.shape}")
        elif tensor.floating and dtype is not None and file.dtype(name) is not kind:
            faults.append(f"{name} is {file.dtype(name)} instead of {kind}")
        else:
            deviations.append(_deviation(name, file, tensor))
    deviations.sort(key=lambda each: -each.allowed if each.allowed == each.allowed else float("-inf"))
    faults += [f"{each.name} is off by {each.error:.1e} of its largest value" for each in deviations if not each.allowed <= 1]
    return deviations, faults


def _index_faults(merged: Path, files: Mapping[str, SafeFile]) -> list[str]:
    stray = {path.name for path in merged.glob("*.safetensors")} - {file.path.name for file in files.values()}
    faults = [f"{name} belongs to no model here" for name in sorted(stray)]
    if (merged / INDEX).is_file():
        weight_map = json.loads((merged / INDEX).read_text())["weight_map"]
        actual = {name: file.path.name for name, file in files.items()}
        faults += [f"{name} is not where the index says" for name in sorted(actual.keys() | weight_map.keys())
                   if actual.get(name) != weight_map.get(name)]  # fmt: skip
    return faults


def is_rounded(block: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether each value of `block` is that of `exact` (float64), rounded once to `dtype`."""
    allowed = _half_unit(exact, torch.finfo(dtype)) + NOISE * exact.abs().max()
    return bool(((block.double() - exact).abs() <= allowed).all())


def _deviation(name: str, file: SafeFile, tensor: ExpectedTensor) -> Deviation:
    """A value may be off by half a unit in its last place, since it was rounded once, and by float64's own noise."""
    kind = torch.finfo(file.dtype(name)) if tensor.floating else None
    largest = max((tensor.rows(*span).abs().max().item() for span in spans(tensor.shape)), default=0.0)
    error, allowed = 0.0, 0.0
    for first, last in spans(tensor.shape):
        exact = tensor.rows(first, last)
        written = file.rows(name, first, last) if tensor.shape else file.read(name)
        off = (written.double() - exact).abs()
        fraction = off / (_half_unit(exact, kind) + NOISE * largest + 1e-300)
        error, allowed = _worse(error, off.max().item()), _worse(allowed, fraction.max().item())
    return Deviation(name, error / (largest or 1.0), allowed)


def _half_unit(values: Tensor, kind: torch.finfo | None) -> Tensor:
    """Return half the distance between neighbours in a type, at each of `values`."""
    if kind is None:
        return torch.zeros_like(values)
    exponents = torch.frexp(values.abs().clamp(min=kind.smallest_normal)).exponent - 1
    half = torch.ldexp(torch.full_like(values, kind.eps / 2), exponents)
    return half if kind.bits >= 32 else half + THROUGH * values.abs()


def _worse(one: float, other: float) -> float:
    """Return the larger, where not-a-number is the largest."""
    return other if other > one or other != other else one
