"""What the sampler computes otherwise: our weights on advantages beside verl's rollout correction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity import Row
from parity_rollouts import of_grpo
from parity_samples import Samples
from tensors import Batch, Outcome
from verl_replay import actor, verl_correction, verl_policy

from halos.trainers.mismatch import Correction

CAP = 1.5


def correction_rows(drawn: Samples) -> list[Row]:
    batch, advantages = drawn.batch, drawn.advantages[:, None] * drawn.batch.mask

    def ours(kind: str, level: str) -> Callable[[], Outcome]:
        weighed, _ = Correction(kind, level, CAP).weigh(advantages, batch.reference, drawn.sampled, batch.mask)
        return of_grpo(batch, weighed, dual_clip=3.0, aggregation="token")

    def theirs(**settings: Any) -> Callable[[], Outcome]:
        weights, kept = verl_correction(batch.reference, drawn.sampled, batch.mask, **settings)
        return lambda: verl_policy(batch, advantages, actor("vanilla"), weights=weights, kept=kept)

    def weighted(level: str, bounds: float | str) -> Callable[[], Outcome]:
        return theirs(rollout_is=level, rollout_is_threshold=bounds)

    def by_sampler() -> Outcome:
        """verl's bypass mode, whose old log-probs are the sampler's."""
        keys = {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": CAP}
        return verl_policy(straight, advantages, actor("bypass_mode", of_loss={"rollout_correction": keys}))

    straight = Batch(batch.policy, drawn.sampled, batch.mask)
    within = f"{1 / CAP!r}_{CAP}"
    return [
        *(Row(f"correction truncate, {level}, cap {CAP}", f"rollout_is {level}, threshold {CAP}", ours("truncate", level),
              weighted(level, CAP)) for level in ("token", "sequence")),
        *(Row(f"correction mask, {level}, cap {CAP}", f'rollout_is {level}, threshold "1/{CAP}_{CAP}"', ours("mask", level),
              weighted(level, within), note="clip_fraction: ours counts no token whose weight is 0")
          for level in ("token", "sequence")),
        Row(f"correction mask, token, cap {CAP}", f"rollout_rs token_k1, threshold {CAP}", ours("mask", "token"),
            theirs(rollout_rs="token_k1", rollout_rs_threshold=CAP), why_not="a rejection of verl's weighs what it keeps by 1,"
            " and what it rejects leaves the number of tokens that the sum is divided by"),
        Row(f"cispo, old log-probs of the sampler, clip_high {CAP - 1}", "`bypass_mode`, reinforce, rollout_is token",
            of_grpo(straight, advantages, objective="cispo", aggregation="token", clip_high=CAP - 1), by_sampler),
    ]  # fmt: skip
