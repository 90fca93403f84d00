"""Layout of a mixture's experts in weight files that hold a matrix per expert, where the model has one stacked parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, dot_natural_key


@dataclass(frozen=True, slots=True)
class ExpertSlice:
    """The rows of a stacked parameter that a tensor of the files becomes when it is loaded."""

    parameter: str
    expert: int
    first: int  # the slice's first row in the expert's matrix


@dataclass(frozen=True, slots=True)
class FusedTensor:
    """A tensor of the files that loading fuses with others into one parameter."""

    name: str
    parameter: str
    rule: WeightConverter
    source: int  # index of the rule's source pattern that the name matches
    shape: list[int]


def expert_slices(tensors: Sequence[FusedTensor]) -> dict[str, ExpertSlice]:
    """Return the slice of each tensor by name. Tensors that are fused in a way that is not covered are left out."""
    slices: dict[str, ExpertSlice] = {}
    for parameter in dict.fromkeys(tensor.parameter for tensor in tensors):
        fused = [tensor for tensor in tensors if tensor.parameter == parameter]
        if not all(_only_stacks(tensor.rule) for tensor in fused):
            continue
        columns = [sorted((each for each in fused if each.source == source), key=lambda each: dot_natural_key(each.name))
                   for source in sorted({each.source for each in fused})]  # fmt: skip
        if len({len(column) for column in columns}) != 1:
            continue
        for expert, row in enumerate(zip(*columns, strict=True)):
            first = 0
            for tensor in row:
                slices[tensor.name] = ExpertSlice(parameter, expert, first)
                first += tensor.shape[0]
    return slices


def _only_stacks(rule: WeightConverter) -> bool:
    """Whether a rule stacks experts, each from matrices one below the other, and does nothing else."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in rule.operations]
    several = len(rule.source_patterns) > 1
    return kinds == [(MergeModulelist, 0), (Concatenate, 1)][: 1 + several] and len(rule.target_patterns) == 1


def stacked_shapes(tensors: Sequence[FusedTensor], slices: Mapping[str, ExpertSlice]) -> dict[str, list[int]]:
    """Return the shape of each parameter that the slices make up."""
    shapes: dict[str, list[int]] = {}
    for tensor in tensors:
        if part := slices.get(tensor.name):
            experts, rows, _ = shapes.get(part.parameter, [0, 0, 0])
            shapes[part.parameter] = [max(experts, part.expert + 1), max(rows, part.first + tensor.shape[0]), tensor.shape[1]]
    return shapes
