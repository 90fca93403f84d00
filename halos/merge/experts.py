"""LoRA on a mixture's experts: the update of a stacked parameter, and of the matrix of each expert.

PEFT's factors of a parameter (experts, out, in) are A (experts * r, in), whose rows for an expert are contiguous, and B
(out, r * experts), whose columns for an expert are strided: number k of expert e is column k * experts + e. Where several
parameters of a module are adapted, PEFT nests their wrappers in the order of the parameters, and names them by their depth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from halos.merge.expert_layout import ExpertSlice
from halos.merge.lora import Update
from halos.merge.safetensors_io import SafeFile, spans

NESTED = ".base_layer"


def parameters_of(model: nn.Module, targets: Sequence[str]) -> dict[str, str]:
    """Map the path of LoRA factors in an adapter's file to the parameter that they change.

    `model` may carry the adapter; `targets` are the target_parameters of its configuration.
    """
    owners: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        owner = path.replace(NESTED, "")
        if ".lora_" in path or ".parametrizations" in path:
            continue
        for name, _ in module.named_parameters(recurse=False):
            parameter = f"{owner}.{name}"
            if any(parameter == target or parameter.endswith(f".{target}") for target in targets):
                owners.setdefault(owner, []).append(name)
    return {owner + NESTED * (len(names) - 1 - index): f"{owner}.{name}"
            for owner, names in owners.items() for index, name in enumerate(names)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertUpdates:
    """The update of a stacked parameter, one expert at a time."""

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

    def merged(self, file: SafeFile, name: str, part: ExpertSlice | None) -> Iterator[Tensor]:
        """Yield blocks of a merged tensor of the files: an expert's slice (`part`), or a stacked tensor, an expert at a time."""
        if part is None:
            for expert in range(self.experts):
                yield self.of(expert).added(file.rows(name, expert, expert + 1)[0], 0)[None]
            return
        update = self.of(part.expert)
        for first, last in spans(file.shape(name)):
            yield update.added(file.rows(name, first, last), part.first + first)


def is_transposed(module: nn.Module | None) -> bool:
    """Whether a module holds its experts as (in, out)."""
    return bool(getattr(module, "is_transposed", False))
