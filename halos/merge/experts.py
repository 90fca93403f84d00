"""LoRA on the experts of a mixture: one pair of factors for a parameter of three dimensions, and for each of its matrices.

PEFT's factors of a parameter (experts, out, in) are A (experts * r, in), an expert's rows together, and B (out, r * experts),
an expert's columns apart: number k of expert e is column k * experts + e. Where a module has several parameters that are
adapted, PEFT wraps one around the other in the order of the parameters, and names them by how deep they lie.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from halos.merge.lora import Update
from halos.merge.pieces import Piece
from halos.merge.safetensors_io import SafeFile, spans

DEEPER = ".base_layer"


def parameters_of(model: nn.Module, targets: Sequence[str]) -> dict[str, str]:
    """How an adapter's file names the parameters that it changes: the path of each of their factors -> the parameter.

    `model` may carry the adapter; `targets` is its configuration's target_parameters.
    """
    owners: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        owner = path.replace(DEEPER, "")
        if ".lora_" in path or ".parametrizations" in path:
            continue
        for name, _ in module.named_parameters(recurse=False):
            whole = f"{owner}.{name}"
            if any(whole == target or whole.endswith(f".{target}") for target in targets):
                owners.setdefault(owner, []).append(name)
    return {owner + DEEPER * (len(names) - 1 - place): f"{owner}.{name}"
            for owner, names in owners.items() for place, name in enumerate(names)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stack:
    """The update of a parameter of three dimensions."""

    file: SafeFile
    a: str
    b: Tensor  # (out, r * experts), read once for all experts
    experts: int
    scaling: float
    transposed: bool  # an expert's matrix is (in, out)

    def of(self, expert: int) -> Update:
        rank = self.file.shape(self.a)[0] // self.experts
        a = self.file.rows(self.a, expert * rank, (expert + 1) * rank).double()
        return Update(a, self.b[:, expert :: self.experts].double(), None, self.scaling, self.transposed)

    def merged(self, file: SafeFile, name: str, piece: Piece | None) -> Iterator[Tensor]:
        """Blocks of one tensor of the files: a `piece`, or the parameter as it is in memory, an expert at a time."""
        if piece is None:
            for expert in range(self.experts):
                yield self.of(expert).added(file.rows(name, expert, expert + 1)[0], 0)[None]
            return
        update = self.of(piece.expert)
        for first, last in spans(file.shape(name)):
            yield update.added(file.rows(name, first, last), piece.first + first)


def is_transposed(module: nn.Module | None) -> bool:
    """Whether a module holds its experts as (in, out)."""
    return bool(getattr(module, "is_transposed", False))
