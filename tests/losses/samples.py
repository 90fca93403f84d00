"""Small batches whose sums are round numbers, and the arithmetic that every loss test shares."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from halos.types import Loss, Mean, Pair, TokenLogps

# Two pairs of unequal lengths. Policy: lp_w = -1.75, -2.5; lp_l = -1.75, -3. Reference: -2.5, -1.75; -1, -3.25.
# So D_w = .75, -.75; D_l = -.75, .25; h = 1.5, -1; |w| = 3, 2; |l| = 2, 4.
POLICY = ([[-0.5, -1.0, -0.25], [-2.0, -0.5]], [[-1.0, -0.75], [-0.25, -0.5, -1.5, -0.75]])
REFERENCE = ([[-1.0, -1.0, -0.5], [-1.5, -0.25]], [[-0.5, -0.5], [-0.5, -1.0, -1.25, -0.5]])
H = np.array([1.5, -1.0])


def logps(rows: Sequence[Sequence[float]]) -> TokenLogps:
    """Ragged rows as a padded, masked leaf that takes a gradient: (rows, time)."""
    widest = max(map(len, rows))
    values = torch.tensor([[*row, *[0.0] * (widest - len(row))] for row in rows], requires_grad=True)
    return TokenLogps(values, torch.arange(widest) < torch.tensor([[len(row)] for row in rows]))


def pair(chosen: Sequence[Sequence[float]], rejected: Sequence[Sequence[float]]) -> Pair:
    return Pair(logps(chosen), logps(rejected))


def whole(*sums: float) -> TokenLogps:
    """Rows of one token each, so that log pi(y|x) and its mean over tokens are both the number given."""
    return logps([[value] for value in sums])


def margins(*values: float) -> tuple[Pair, Pair]:
    """A policy and a reference whose h is `values`: half of it gained by the chosen, half lost by the rejected."""
    half = [value / 2 for value in values]
    policy = Pair(whole(*[-2 + x for x in half]), whole(*[-3 - x for x in half]))
    return policy, Pair(whole(*[-2.0] * len(half)), whole(*[-3.0] * len(half)))


def softplus(x: np.ndarray | float) -> np.ndarray:
    """-log sigmoid(-x) in float64, written without a logistic function."""
    return np.logaddexp(0.0, np.asarray(x, dtype=np.float64))


def gradients(loss: Loss, *leaves: Tensor) -> list[np.ndarray]:
    """d(sum of values) / d(leaf), for each leaf."""
    return [gradient.numpy() for gradient in torch.autograd.grad(loss.values.sum(), leaves)]


def number(mean: Mean) -> float:
    return (mean.total / mean.count).item()


def numbers(loss: Loss) -> np.ndarray:
    return loss.values.detach().double().numpy()


def add_up(parts: Iterable[Loss]) -> dict[str, tuple[float, float]]:
    """Metrics of several micro-batches, totals and counts added."""
    sums: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, mean in part.metrics.items():
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = (total + mean.total.item(), count + mean.count.item())
    return sums
