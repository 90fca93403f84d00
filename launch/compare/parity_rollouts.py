"""Our losses on rollouts as the rows of a comparison call them: one global batch, given advantages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parity import means
from tensors import Batch, Outcome, entropies
from torch import Tensor

from halos.losses import grpo
from halos.types import Loss, Rollouts, TokenLogps

PLAIN: dict[str, Any] = {
    "objective": "clip", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "tau_positive": None,
    "tau_negative": None, "off_policy_threshold": None, "aggregation": "sequence", "max_tokens": None, "beta": 0.0,
    "kl_estimator": "k3", "kl_ratio": True, "entropy_coefficient": 0.0,
}  # fmt: skip
GATE = {"objective": "sapo", "clip_low": None, "clip_high": None, "tau_positive": 1.0, "tau_negative": 1.05}
GSPO = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}
CLIP = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "entropy_coefficient": 0.0}
SHARED = ("clip_fraction", "kl")  # metrics that peers log too


def rollouts(batch: Batch, advantages: Tensor, **statistics: Tensor) -> Rollouts:
    """`batch.reference` are the old log-probs; `advantages` (rows,) or (rows, time)."""
    given = advantages if advantages.ndim == 2 else advantages[:, None] * batch.mask
    return Rollouts(TokenLogps(batch.policy, batch.mask, **statistics), batch.reference, given, torch.zeros(len(batch.mask)))


def on_rollouts(batch: Batch, loss: Loss) -> Outcome:
    """The terms of a loss over the counts of the global batch, as the trainer divides them."""
    counts = {"token": int(batch.mask.sum()), "item": len(batch.mask)}
    mean = torch.stack([part.values.sum() / counts[part.per] for part in loss.terms.values()]).sum()
    return batch.outcome(mean, {name: value for name, value in means(loss).items() if name in SHARED})


def of_grpo(batch: Batch, advantages: Tensor, **keys: Any) -> Callable[[], Outcome]:
    """`grpo` with verl's and TRL's common defaults but for `keys`; the reference model's log-probs are the old ones."""

    def run() -> Outcome:
        reference = batch.reference_logps if keys.get("beta") else None
        statistics = {"entropy": entropies(batch)} if keys.get("entropy_coefficient") else {}
        return on_rollouts(batch, grpo.grpo(rollouts(batch, advantages, **statistics), reference, **{**PLAIN, **keys}))

    return run


def of_clipped(loss: Callable[..., Loss], batch: Batch, advantages: Tensor, **keys: Any) -> Callable[[], Outcome]:
    """`rloo` and `reinforce_plus_plus`, which take the clip's keys alone."""
    return lambda: on_rollouts(batch, loss(rollouts(batch, advantages), **{**CLIP, **keys}))
