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

CAP, FLOOR = 1.5, 0.4
NEAR = 0.9, 1.05  # of a mean over tokens, which varies less


def correction_rows(drawn: Samples) -> list[Row]:
    batch, advantages = drawn.batch, drawn.advantages[:, None] * drawn.batch.mask

    def ours(
        kind: str, level: str, floor: float | None = None, cap: float = CAP, mean: str = "token", times: float = 1.0
    ) -> Callable[[], Outcome]:
        weighed, _ = Correction(kind, level, cap, floor).weigh(advantages, batch.reference, drawn.sampled, batch.mask)
        return of_grpo(batch, times * weighed, dual_clip=3.0, aggregation=mean)

    def theirs(mean: str = "token-mean", **settings: Any) -> Callable[[], Outcome]:
        weights, kept = verl_correction(batch.reference, drawn.sampled, batch.mask, **settings)
        return lambda: verl_policy(batch, advantages, actor("vanilla", loss_agg_mode=mean), weights=weights, kept=kept)

    def weighted(level: str, bounds: float | str) -> Callable[[], Outcome]:
        return theirs(rollout_is=level, rollout_is_threshold=bounds)

    def by_sampler() -> Outcome:
        """verl's bypass mode, whose old log-probs are the sampler's."""
        keys = {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": CAP}
        return verl_policy(straight, advantages, actor("bypass_mode", of_loss={"rollout_correction": keys}))

    straight = Batch(batch.policy, drawn.sampled, batch.mask)
    both, uncounted = ("token", "sequence"), "clip_fraction: ours counts no token whose weight is 0"
    return [
        *(Row(f"correction truncate, {level}, cap {CAP}", f"rollout_is {level}, threshold {CAP}", ours("truncate", level),
              weighted(level, CAP)) for level in both),
        *(Row(f"correction mask, {level}, cap {CAP}", f"rollout_is {level}, threshold 1/{CAP} and {CAP}", ours("mask", level),
              weighted(level, f"{1 / CAP!r}_{CAP}"), note=uncounted) for level in both),
        *(Row(f"correction mask, {level}, floor {FLOOR}, cap {CAP}", f"rollout_is {level}, threshold {FLOOR}_{CAP}",
              ours("mask", level, FLOOR), weighted(level, f"{FLOOR}_{CAP}"), note=uncounted) for level in both),
        *_rejected_rows(drawn, ours, theirs),
        Row(f"cispo, old log-probs of the sampler, clip_high {CAP - 1}", "`bypass_mode`, reinforce, rollout_is token",
            of_grpo(straight, advantages, objective="cispo", aggregation="token", clip_low=None, clip_high=CAP - 1), by_sampler),
    ]  # fmt: skip


def _rejected_rows(drawn: Samples, ours: Callable[..., Any], theirs: Callable[..., Any]) -> list[Row]:
    """verl's k1 is log pi_sampler / pi_trainer, so that its bounds are one over ours; it rejects by them, and weighs what is left
    by 1."""
    token = {"rollout_rs": "token_k1", "rollout_rs_threshold": CAP}
    _, kept = verl_correction(drawn.batch.reference, drawn.sampled, drawn.batch.mask, **token)
    share = (drawn.batch.mask.sum() / kept.sum()).item()

    def by_sequence(level: str, floor: float, cap: float) -> tuple[str, Callable[[], Outcome]]:
        named = f"correction reject, {level}, floor {floor}, cap {cap}, by sequence"
        return named, ours("reject", level, floor, cap, mean="sequence")

    def by_mean(name: str, least: float, most: float) -> tuple[str, Callable[[], Outcome]]:
        run = theirs("seq-mean-token-mean", rollout_rs=name, rollout_rs_threshold=f"{least!r}_{most!r}")
        return f"rollout_rs {name}, {least:.4g}_{most:.4g}", run

    def row(ours: tuple[str, Any], theirs: tuple[str, Any], **more: str) -> Row:
        return Row(ours[0], theirs[0], ours[1], theirs[1], **more)

    other = "clip_fraction: verl's is of what is kept"
    return [
        row(by_sequence("geometric", *NEAR), by_mean("seq_mean_k1", 1 / NEAR[1], 1 / NEAR[0]), note=other),
        row(by_sequence("sequence", FLOOR, CAP), by_mean("seq_sum_k1", 1 / CAP, 1 / FLOOR), note=other),
        row(by_sequence("geometric", *NEAR), by_mean("seq_mean_k1", *NEAR),
            why_not="the bounds of verl's k1 are of pi_sampler / pi_trainer"),
        Row(f"correction reject, token, cap {CAP}, times tokens / kept tokens", f"rollout_rs token_k1, {CAP}",
            ours("reject", "token", times=share), theirs(**token), note=other),
        Row(f"correction reject, token, cap {CAP}", f"rollout_rs token_k1, {CAP}", ours("reject", "token"), theirs(**token),
            why_not="what verl rejects leaves the number of tokens that the sum is divided by; here, as in TRL, it stays"),
    ]  # fmt: skip
