"""The expected value of a merged mixture's experts, computed independently of the code that merges them.

PEFT itself says which factors belong to which parameter, transformers' own rules which rows of it a tensor of the files becomes
when it is loaded, and the update is the sum that PEFT computes.
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

from halos.merge.expert_layout import FusedTensor


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """The rows of a stacked parameter that a tensor of the files becomes when it is loaded."""

    expert: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class TargetParameter:
    """A parameter that LoRA factors change (peft.target_parameters)."""

    parameter: str
    experts: int  # 1 for a parameter of two dimensions
    transposed: bool  # it holds its experts as (in, out)

    def shape_of(self, a: list[int], b: list[int], rows: ExpertRows | None) -> list[int]:
        """Return the shape that factors of shapes `a` and `b` change: the whole parameter's, or that of its `rows`."""
        matrix = [a[1], b[0]] if self.transposed else [b[0], a[1]]
        return [rows.last - rows.first, matrix[1]] if rows else [self.experts, *matrix]


def target_parameters(model: PreTrainedModel, config: Mapping[str, Any]) -> dict[str, TargetParameter]:
    """Return the target parameters by the path of their factors in an adapter's file. `model` is on the meta device."""
    if not config.get("target_parameters"):
        return {}
    fields = LoraConfig.__dataclass_fields__
    settings = {name: value for name, value in config.items() if name in fields and name not in ("rank_pattern", "alpha_pattern")}
    adapted = inject_adapter_in_model(LoraConfig(**settings), deepcopy(model), low_cpu_mem_usage=True)
    return {
        path: TargetParameter(
            f"{path.replace('.base_layer', '')}.{module.parameter_name}",
            module.num_experts,
            bool(getattr(module.get_base_layer(), "is_transposed", False)),
        )
        for path, module in adapted.named_modules()
        if isinstance(module, ParamWrapper)
    }


def expert_rows(model: PreTrainedModel, tensors: Sequence[FusedTensor]) -> dict[str, ExpertRows]:
    """Return the rows of each tensor by name. Each is replaced by one column that holds its index and loaded by transformers."""
    by_name: dict[str, ExpertRows] = {}
    for parameter in dict.fromkeys(tensor.parameter for tensor in tensors):
        fused = [tensor for tensor in tensors if tensor.parameter == parameter]
        if any(len(tensor.shape) != 2 for tensor in fused):
            continue
        loaded = _loaded(model, fused)
        if loaded is None or loaded.dim() != 3:
            continue
        runs: dict[int, list[ExpertRows]] = {}
        for expert, column in enumerate(loaded[..., 0]):
            numbers, counts = torch.unique_consecutive(column, return_counts=True)
            for number, last, count in zip(numbers.tolist(), counts.cumsum(0).tolist(), counts.tolist(), strict=True):
                runs.setdefault(number, []).append(ExpertRows(expert, last - count, last))
        by_name |= {fused[number].name: rows[0] for number, rows in runs.items() if len(rows) == 1}
    return by_name


def _loaded(model: PreTrainedModel, tensors: Sequence[FusedTensor]) -> Tensor | None:
    rule, parameter = deepcopy(tensors[0].rule), tensors[0].parameter
    for number, tensor in sorted(enumerate(tensors), key=lambda each: dot_natural_key(each[1].name)):
        column = torch.full((tensor.shape[0], 1), number)
        rule.add_tensor(parameter, tensor.name, rule.source_patterns[tensor.source], column)  # type: ignore[arg-type]
    try:
        result = rule.convert(parameter, model=model, config=model.config)
    except (ValueError, RuntimeError, IndexError):
        return None
    loaded = result.get(parameter)
    return loaded if isinstance(loaded, Tensor) else None


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of a parameter, as PEFT sums them: number k of expert e is row e * r + k of A, column k * experts + e of B."""

    a: Tensor  # (experts * r, in)
    b: Tensor  # (out, r * experts)
    scale: float
    experts: int
    transposed: bool

    def delta(self, rows: ExpertRows | None, first: int, last: int) -> Tensor:
        """Return `first` to `last` of the update, in float64: rows of those `rows`, or experts of the whole parameter."""
        if rows is None:
            return torch.stack([self._of(expert) for expert in range(first, last)])
        return self._of(rows.expert, slice(rows.first + first, rows.first + last))

    def _of(self, expert: int, rows: slice = slice(None)) -> Tensor:
        a = self.a.unflatten(0, (self.experts, -1))[expert].double()
        b = self.b.unflatten(1, (-1, self.experts))[..., expert].double()
        if self.transposed:
            return self.scale * torch.einsum("or,ri->io", b, a[:, rows])
        return self.scale * torch.einsum("or,ri->oi", b[rows], a)
