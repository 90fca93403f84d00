"""What the experts of a merged mixture must be, apart from the code that merges them.

PEFT itself says which factors belong to which parameter, transformers' own rules say where a tensor of the files lands when it
is loaded, and the update is the sum that PEFT computes.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from halos.merge.pieces import Part


@dataclass(frozen=True, slots=True)
class Landing:
    """The rows of a parameter that a tensor of the files becomes."""

    expert: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Named:
    """A parameter that factors change, how many experts it has, and whether it holds them as (in, out)."""

    parameter: str
    experts: int  # 1 for one of two dimensions
    transposed: bool

    def shape_of(self, a: list[int], b: list[int], place: Landing | None) -> list[int]:
        """What factors of these shapes change: the whole parameter, or what lands at `place`."""
        matrix = [a[1], b[0]] if self.transposed else [b[0], a[1]]
        return [place.last - place.first, matrix[1]] if place else [self.experts, *matrix]


def named_by_peft(model: PreTrainedModel, config: Mapping[str, Any]) -> dict[str, Named]:
    """By the path of the factors in an adapter's file. `model` lies on the meta device."""
    if not config.get("target_parameters"):
        return {}
    known = LoraConfig.__dataclass_fields__
    settings = {name: value for name, value in config.items() if name in known and name not in ("rank_pattern", "alpha_pattern")}
    adapted = inject_adapter_in_model(LoraConfig(**settings), deepcopy(model), low_cpu_mem_usage=True)
    return {
        path: Named(
            f"{path.replace('.base_layer', '')}.{module.parameter_name}",
            module.num_experts,
            bool(getattr(module.get_base_layer(), "is_transposed", False)),
        )
        for path, module in adapted.named_modules()
        if isinstance(module, ParamWrapper)
    }


def landings(model: PreTrainedModel, parts: Sequence[Part]) -> dict[str, Landing]:
    """By name. Each tensor is stood in for by one column that holds its number, and loaded as transformers would."""
    found: dict[str, Landing] = {}
    for whole in dict.fromkeys(part.whole for part in parts):
        mine = [part for part in parts if part.whole == whole]
        if any(len(part.shape) != 2 for part in mine):
            continue
        loaded = _loaded(model, mine)
        if loaded is None or loaded.dim() != 3:
            continue
        runs: dict[int, list[Landing]] = {}
        for expert, column in enumerate(loaded[..., 0]):
            numbers, counts = torch.unique_consecutive(column, return_counts=True)
            for number, last, count in zip(numbers.tolist(), counts.cumsum(0).tolist(), counts.tolist(), strict=True):
                runs.setdefault(number, []).append(Landing(expert, last - count, last))
        found |= {mine[number].name: places[0] for number, places in runs.items() if len(places) == 1}
    return found


def _loaded(model: PreTrainedModel, parts: Sequence[Part]) -> Tensor | None:
    rule = deepcopy(parts[0].rule)
    for number, part in sorted(enumerate(parts), key=lambda each: dot_natural_key(each[1].name)):
        column = torch.full((part.shape[0], 1), number)
        rule.add_tensor(part.whole, part.name, rule.source_patterns[part.source], column)  # type: ignore[arg-type]
    try:
        result = rule.convert(part.whole, model=model, config=model.config)
    except (ValueError, RuntimeError, IndexError):
        return None
    whole = result.get(parts[0].whole)
    return whole if isinstance(whole, Tensor) else None


@dataclass(frozen=True, slots=True)
class Factors:
    """Of a parameter, as PEFT sums them: number k of expert e is row e * r + k of A and column k * experts + e of B."""

    a: Tensor  # (experts * r, in)
    b: Tensor  # (out, r * experts)
    scale: float
    experts: int
    transposed: bool

    def delta(self, place: Landing | None, first: int, last: int) -> Tensor:
        """Rows of what is added, float64: to the tensor that lands at `place`, or experts of the whole parameter."""
        if place is None:
            return torch.stack([self._of(expert) for expert in range(first, last)])
        return self._of(place.expert, slice(place.first + first, place.first + last))

    def _of(self, expert: int, rows: slice = slice(None)) -> Tensor:
        a = self.a.unflatten(0, (self.experts, -1))[expert].double()
        b = self.b.unflatten(1, (-1, self.experts))[..., expert].double()
        if self.transposed:
            return self.scale * torch.einsum("or,ri->io", b, a[:, rows])
        return self.scale * torch.einsum("or,ri->oi", b[rows], a)
