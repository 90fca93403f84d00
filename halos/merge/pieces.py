"""The experts of a mixture on the disk: a matrix for each, where the model has one parameter of three dimensions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, dot_natural_key


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a tensor of the files lies in the parameter that loading makes of several."""

    whole: str  # the parameter
    expert: int
    first: int  # its first row in the expert's matrix


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the files that loading puts together with others."""

    name: str
    whole: str
    rule: WeightConverter
    source: int  # which of the rule's sources it is
    shape: list[int]


def pieces(parts: Sequence[Part]) -> dict[str, Piece]:
    """By name. What is put together in a way that is not known here is left out."""
    found: dict[str, Piece] = {}
    for whole in dict.fromkeys(part.whole for part in parts):
        mine = [part for part in parts if part.whole == whole]
        if not all(_stacks(part.rule) for part in mine):
            continue
        columns = [sorted((part for part in mine if part.source == source), key=lambda part: dot_natural_key(part.name))
                   for source in sorted({part.source for part in mine})]  # fmt: skip
        if len({len(column) for column in columns}) != 1:
            continue
        for expert, row in enumerate(zip(*columns, strict=True)):
            first = 0
            for part in row:
                found[part.name] = Piece(whole, expert, first)
                first += part.shape[0]
    return found


def _stacks(rule: WeightConverter) -> bool:
    """Whether it stacks experts, and of each sets matrices one below the other, and does nothing else."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in rule.operations]
    several = len(rule.source_patterns) > 1
    return kinds == [(MergeModulelist, 0), (Concatenate, 1)][: 1 + several] and len(rule.target_patterns) == 1


def shapes(parts: Sequence[Part], where: Mapping[str, Piece]) -> dict[str, list[int]]:
    """Of the parameters that the pieces make."""
    found: dict[str, list[int]] = {}
    for part in parts:
        if piece := where.get(part.name):
            experts, rows, _ = found.get(piece.whole, [0, 0, 0])
            found[piece.whole] = [max(experts, piece.expert + 1), max(rows, piece.first + part.shape[0]), part.shape[1]]
    return found
