"""Muon for the matrices of the hidden layers and AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Sequence, Set
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from halos.optimizers.standard import Betas, Eps, Group, adamw
from halos.ranges import Range


def muon(
    params: Sequence[Group],
    lr: float,
    hidden: Set[Tensor],
    *,
    betas: Betas,
    eps: Eps,
    fused: Literal["auto", True, False],
    momentum: Annotated[float, Range(least=0, below=1)],
    nesterov: bool,
    ns_steps: Annotated[int, Range(least=1, most=99)],
    adjust_lr: Literal["match_rms_adamw", "original"],
) -> Optimizer:
    """https://kellerjordan.github.io/posts/muon, arXiv:2502.16982. `betas`, `eps` and `fused` are AdamW's.

    Embeddings, the head, norms, biases and whatever is not two-dimensional go to AdamW, as with Jordan and Moonlight.
    """
    matrices, others = (_groups_of(params, lambda p, inside=inside: (p in hidden) is inside) for inside in (True, False))
    parts: list[Muon | AdamW] = []
    if matrices:
        settings: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr}
        parts.append(Muon(matrices, lr=lr, **settings))
    if others:
        parts.append(adamw(others, lr, betas=betas, eps=eps, fused=fused))
    return CombinedOptimizer(parts)


def _groups_of(params: Sequence[Group], wanted: Callable[[Tensor], bool]) -> list[Group]:
    """The parameter groups with only the wanted parameters; groups left empty are dropped."""
    groups = [{**group, "params": [parameter for parameter in group["params"] if wanted(parameter)]} for group in params]
    return [group for group in groups if group["params"]]


class CombinedOptimizer(Optimizer):
    """Several optimizers over disjoint parameters as one: one state, one list of groups, one step."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share_state()

    def _share_state(self) -> None:
        """Point the parts at this optimizer's state and groups, which load_state_dict replaces."""
        first = 0
        for part in self._parts:
            last = first + len(part.param_groups)
            part.state, part.param_groups, first = self.state, self.param_groups[first:last], last

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "the loop passes none"
        self._share_state()
        for part in self._parts:
            part.step()
        return None
