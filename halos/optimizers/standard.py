"""Optimizers from torch.optim."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from torch.optim import SGD, Adafactor, Adam, AdamW, RMSprop

from halos.ranges import Range

Group = dict[str, Any]  # params, lr, weight_decay
Betas = Annotated[tuple[float, float], Range(least=0, below=1)]
Eps = Annotated[float, Range(above=0)]


def adamw(params: Sequence[Group], lr: float, *, betas: Betas, eps: Eps, fused: Literal["auto", True, False]) -> AdamW:
    """arXiv:1711.05101."""
    wanted = on_gpu(params) if fused == "auto" else fused
    return AdamW(params, lr=lr, betas=betas, eps=eps, fused=wanted or None)  # False would also turn off foreach


def adam(params: Sequence[Group], lr: float, *, betas: Betas, eps: Eps) -> Adam:
    """arXiv:1412.6980; weight decay is L2 regularisation, added to the gradient."""
    return Adam(params, lr=lr, betas=betas, eps=eps)


def rmsprop(params: Sequence[Group], lr: float, *, eps: Eps) -> RMSprop:
    return RMSprop(params, lr=lr, eps=eps)


def sgd(params: Sequence[Group], lr: float) -> SGD:
    return SGD(params, lr=lr)


def adafactor(
    params: Sequence[Group],
    lr: float,
    *,
    beta2_decay: Annotated[float, Range(below=0)],
    eps: tuple[float | None, float],
    d: Annotated[float, Range(above=0)],
) -> Adafactor:
    """arXiv:1804.04235; without foreach, which adds in another order."""
    return Adafactor(params, lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, foreach=False)


def on_gpu(params: Sequence[Group]) -> bool:
    return all(parameter.device.type == "cuda" for group in params for parameter in group["params"])
