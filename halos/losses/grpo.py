"""Group Relative Policy Optimization. Dr. GRPO, DAPO, GSPO, CISPO, SAPO, OPO and MaxRL are settings of the one function."""

from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from halos.losses import entropy
from halos.losses.entropy import Coefficient, adapt_entropy, token_statistics, with_entropy  # noqa: F401
from halos.losses.rollouts import (
    KL,
    all_equal,
    clipped,
    deviation,
    divided,
    is_clipped,
    kl,
    log_ratio,
    mean_over_time,
    of_group,
    report,
    with_ratio,
)
from halos.types import Estimates, Loss, Mean, Range, Rollouts, Sampled, TokenLogps


def needs_reference(*, beta: float) -> bool:
    """No reference model is loaded when there is no KL term."""
    return beta > 0


def ratio_level(*, ratio: str) -> str:
    return ratio


def check(
    *, objective: str, ratio: str, aggregation: str, max_tokens: int | None, beta: float, kl_estimator: str, kl_ratio: bool,
    clip_low: float | None, clip_high: float | None, dual_clip: float | None, tau_positive: float | None,
    tau_negative: float | None, entropy_coefficient: float, entropy_target: float | None, entropy_most: float,
) -> str | None:  # fmt: skip
    if (aggregation == "constant") != (max_tokens is not None):
        return (
            "loss.max_tokens goes with loss.aggregation=constant, which divides by it: give both, or null and another aggregation"
        )
    if objective != "clip" and ratio == "sequence":
        return f"loss.objective={objective} weights tokens, so it takes loss.ratio=token"
    if objective != "clip" and dual_clip is not None:
        return f"loss.dual_clip={dual_clip:g} goes with loss.objective=clip: leave it out"
    gated, soft = (clip_low, clip_high), (tau_positive, tau_negative)
    if objective == "sapo" and (None in soft or gated != (None, None)):
        return (
            "loss.objective=sapo has a gate and no clip: give loss.tau_positive and tau_negative, and null for clip_low and"
            " clip_high"
        )
    needed = (clip_high,) if objective == "cispo" else gated  # its ratio may have no lower bound
    if objective != "sapo" and (None in needed or soft != (None, None)):
        return (
            f"loss.objective={objective} has a clip and no gate: give loss.clip_low and clip_high, and null for tau_positive and"
            " tau_negative"
        )
    if beta > 0 and kl_estimator == "k1" and not kl_ratio:
        return (
            "loss.kl_ratio=false leaves loss.kl_estimator=k1 without a gradient in expectation, so that loss.beta would do"
            " nothing: use loss.kl_ratio=true, or k2 or k3"
        )
    return entropy.check(entropy_coefficient=entropy_coefficient, entropy_target=entropy_target, entropy_most=entropy_most)


def check_rewards(rewards: np.ndarray, *, advantage_scale: str) -> str | None:
    """`rewards` (rows,) are those of the data, or of a batch that was sampled."""
    if advantage_scale == "mean" and len(rewards) and rewards.min() < 0:
        return (
            f"loss.advantage_scale=mean divides by the mean reward of a group, so rewards are from 0 up, and one is"
            f" {rewards.min():g} (labels and pairs give 1 and -1): other rewards, or another loss"
        )
    return None


def advantages(
    sampled: Sampled,
    *,
    baseline: Literal["mean", "length"],
    advantage_scale: Literal["group", "batch", "mean", "none"],
    std_ddof: Annotated[int, Range(least=0, most=1)],
    epsilon: Annotated[float, Range(least=0)],
) -> Estimates:
    """A = r - baseline of the group, divided by (std + epsilon) of the group or of the global batch, by the group's mean reward
    + epsilon, or not divided.

    Eq. 3 of arXiv:2402.03300; undivided, it is the advantage of Dr. GRPO (arXiv:2503.20783). The baseline `length`, a mean
    weighted by the numbers of tokens, is that of OPO (arXiv:2505.23585); the division by the mean is MaxRL's (arXiv:2602.02710).
    """
    mean, squares, sizes = of_group(sampled.rewards, sampled.groups)
    values = sampled.rewards - (mean if baseline == "mean" else _by_length(sampled))
    if advantage_scale == "group":
        values = divided(values, (squares / (sizes - std_ddof).clamp(min=1)).sqrt(), mean, epsilon)
    elif advantage_scale == "batch":
        count = len(sampled.rewards)
        spread = (sampled.rewards - sampled.rewards.mean()).square().sum() / max(1, count - std_ddof)
        values = divided(values, spread.sqrt(), mean, epsilon)
    elif advantage_scale == "mean":
        values = torch.where(mean > 0, values / (mean + epsilon), 0.0)
    whole = torch.where(sampled.old.mask, values.float()[:, None], 0.0)
    return Estimates(whole, None, {"groups/all_equal": all_equal(sampled), "advantages/std": deviation(values)})


def _by_length(sampled: Sampled) -> Tensor:
    """The mean reward of each row's group, each weighted by its number of tokens: (rows,); 0 where all are masked."""
    lengths = sampled.old.length.to(sampled.rewards.dtype)
    weighted, _, _ = of_group(sampled.rewards * lengths, sampled.groups)
    tokens, _, _ = of_group(lengths, sampled.groups)
    return torch.where(tokens > 0, weighted / tokens, 0.0)


def grpo(
    policy: Rollouts,
    reference: TokenLogps | None,
    *,
    objective: Literal["clip", "cispo", "sapo"],
    ratio: Literal["token", "sequence"],
    clip_low: Annotated[float | None, Range(least=0)],
    clip_high: Annotated[float | None, Range(least=0)],
    dual_clip: Annotated[float | None, Range(above=1)],
    tau_positive: Annotated[float | None, Range(above=0)],
    tau_negative: Annotated[float | None, Range(above=0)],
    off_policy_threshold: Annotated[float | None, Range(above=0)],
    aggregation: Literal["sequence", "token", "constant"],
    max_tokens: Annotated[int | None, Range(least=1)],
    beta: Annotated[float, Range(least=0)],
    kl_estimator: KL,
    kl_ratio: bool,
    entropy_coefficient: Coefficient,
) -> Loss:
    """Eq. 3 of arXiv:2402.03300, token by token, with `beta` times an estimate of the KL to the reference.

    With `kl_ratio` the gradient of that estimate is exact (`with_ratio`); without it the estimate is that equation's. `ratio`
    sequence is the geometric mean over a completion's tokens (eq. 7 of arXiv:2507.18071). `aggregation` chooses the denominator:
    the mean over a completion's tokens and then over completions (sequence), the mean over all tokens of the global batch (token,
    section 3.3 of arXiv:2503.14476), or the sum over tokens divided by `max_tokens` (constant, arXiv:2503.20783).
    """
    mask, logs = policy.logps.mask, log_ratio(policy)
    r = (mean_over_time(logs, mask)[:, None] if ratio == "sequence" else logs).exp()
    if objective == "sapo":
        values, clip_acts = gated(r, policy.advantages, _given(tau_positive), _given(tau_negative)), torch.zeros_like(mask)
    elif objective == "cispo":
        least, most = 0.0 if clip_low is None else 1 - clip_low, 1 + _given(clip_high)
        values = -r.clamp(least, most).detach() * policy.advantages * policy.logps.values
        clip_acts = (r < least) | (r > most)
    else:
        bounds = _given(clip_low), _given(clip_high), dual_clip
        values, clip_acts = clipped(r, policy.advantages, *bounds), is_clipped(r, policy.advantages, *bounds)
    metrics = report(policy, clip_acts)
    if off_policy_threshold is not None:
        values, metrics["off_policy/masked"] = _on_policy(values, policy, logs, off_policy_threshold)
    if reference is not None:
        divergence = kl(kl_estimator, policy.logps.values, reference.values)
        values = values + beta * (with_ratio(kl_estimator, divergence, logs.exp()) if kl_ratio else divergence)
        metrics["kl"] = Mean.of(divergence, mask)  # per token; other losses on rollouts report it per completion
    return with_entropy(_aggregated(values * mask, mask, metrics, aggregation, max_tokens), policy, entropy_coefficient)


def gated(ratio: Tensor, advantages: Tensor, positive: float, negative: float) -> Tensor:
    """-(4 / tau) sigmoid(tau (r - 1)) A, with the tau of the advantage's sign: the gate of arXiv:2511.20347."""
    tau = torch.where(advantages > 0, positive, negative)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def _on_policy(values: Tensor, policy: Rollouts, logs: Tensor, threshold: float) -> tuple[Tensor, Mean]:
    """Values (rows, time), 0 for the completions that got worse than their group and that the policy has left by more than
    `threshold` nats a token, and the share of these. Eq. 9 of arXiv:2512.02556; `logs` is log pi / pi_old."""
    mask = policy.logps.mask
    has_left = (-mean_over_time(logs, mask).detach() > threshold)[:, None] & (policy.advantages < 0)
    return torch.where(has_left, 0.0, values), Mean.of((has_left & mask).any(-1), mask.any(-1))


def _aggregated(
    values: Tensor, mask: Tensor, metrics: dict[str, Mean], aggregation: str, max_tokens: int | None
) -> Loss:  # fmt: skip
    """Values of tokens (rows, time) with the denominator that `aggregation` chooses."""
    if aggregation == "token":
        return Loss(values, metrics, per="token")
    if aggregation == "sequence":
        return Loss(mean_over_time(values, mask), metrics)
    assert max_tokens is not None, "check() lets no other case through"
    return Loss(values.sum(-1) / max_tokens, metrics)


def _given(value: float | None) -> float:
    assert value is not None, "check() lets no other case through"
    return value
