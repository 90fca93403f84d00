"""Small rollouts whose numbers can be worked by hand, and the arithmetic that their tests share."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from halos.types import Rollouts, Sampled, TokenLogps, ValuedRollouts

from .samples import logps

NEW = [[-0.5, -1.0, -0.25], [-2.0, -0.5]]  # log-probs of two completions, of 3 and 2 tokens
OLD = [[-0.7, -0.9, -0.25], [-1.5, -0.8]]
MASK = np.array([[1, 1, 1], [1, 1, 0]], bool)
RATIO = np.exp(np.array([[0.2, -0.1, 0.0], [-0.5, 0.3, 0.0]]))  # new / old


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    return logps(rows).values.detach()


def rollouts(advantages: Sequence[float], new: Sequence[Sequence[float]] = NEW) -> Rollouts:
    """Each row's advantage at all of its tokens."""
    policy = logps(new)
    spread = torch.tensor(advantages)[:, None] * policy.mask
    return Rollouts(policy, padded(OLD), spread, torch.tensor([1.0, 0.0]))


def valued(advantages: Sequence[float], values: Tensor, old: Tensor, returns: Tensor) -> ValuedRollouts:
    given = rollouts(advantages)
    return ValuedRollouts(given.logps, given.old, given.advantages, given.rewards, values, old, returns)


def sampled(
    rewards: Sequence[float], groups: Sequence[int], old: Sequence[Sequence[float]] | None = None,
    reference: Sequence[Sequence[float]] | None = None, values: Sequence[Sequence[float]] | None = None,
) -> Sampled:  # fmt: skip
    rows = old or [[-1.0]] * len(rewards)
    made = logps(rows)
    return Sampled(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), TokenLogps(made.values.detach(), made.mask),
        padded(reference) if reference else None, padded(values) if values else None,
    )  # fmt: skip


def clip_objective(ratio: np.ndarray, advantage: np.ndarray, low: float, high: float) -> np.ndarray:
    return -np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
