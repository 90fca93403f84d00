"""Group Relative Policy Optimization. Its variants Dr. GRPO, DAPO, GSPO and CISPO are settings of one function."""

from typing import Annotated, Literal

import torch

from halos.losses.rollouts import (
    KL,
    all_equal,
    clipped,
    deviation,
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
    *, objective: str, ratio: str, aggregation: str, max_tokens: int | None, beta: float, kl_estimator: str, kl_ratio: bool
) -> str | None:
    if (aggregation == "constant") != (max_tokens is not None):
        return (
            "loss.max_tokens goes with loss.aggregation=constant, which divides by it: give both, or null and another aggregation"
        )
    if objective == "cispo" and ratio == "sequence":
        return "loss.objective=cispo weights tokens, so it takes loss.ratio=token"
    if beta > 0 and kl_estimator == "k1" and not kl_ratio:
        return (
            "loss.kl_ratio=false leaves loss.kl_estimator=k1 without a gradient in expectation, so that loss.beta would do"
            " nothing: use loss.kl_ratio=true, or k2 or k3"
        )
    return None


def advantages(
    sampled: Sampled,
    *,
    advantage_scale: Literal["group", "batch", "none"],
    std_ddof: Annotated[int, Range(least=0, most=1)],
    epsilon: Annotated[float, Range(least=0)],
) -> Estimates:
    """A = r - mean(r of the group), divided by (std + epsilon) of the group, of the global batch, or not divided.

    Eq. 3 of arXiv:2402.03300; undivided, it is the advantage of Dr. GRPO (arXiv:2503.20783).
    """
    mean, squares, sizes = of_group(sampled.rewards, sampled.groups)
    values = sampled.rewards - mean
    if advantage_scale == "group":
        values = values / ((squares / (sizes - std_ddof).clamp(min=1)).sqrt() + epsilon)
    elif advantage_scale == "batch":
        count = len(sampled.rewards)
        spread = (sampled.rewards - sampled.rewards.mean()).square().sum() / max(1, count - std_ddof)
        values = values / (spread.sqrt() + epsilon)
    whole = torch.where(sampled.old.mask, values.float()[:, None], 0.0)
    return Estimates(whole, None, {"groups/all_equal": all_equal(sampled), "advantages/std": deviation(values)})


def grpo(
    policy: Rollouts,
    reference: TokenLogps | None,
    *,
    objective: Literal["clip", "cispo"],
    ratio: Literal["token", "sequence"],
    clip_low: Annotated[float, Range(least=0)],
    clip_high: Annotated[float, Range(least=0)],
    aggregation: Literal["sequence", "token", "constant"],
    max_tokens: Annotated[int | None, Range(least=1)],
    beta: Annotated[float, Range(least=0)],
    kl_estimator: KL,
    kl_ratio: bool,
) -> Loss:
    """Eq. 3 of arXiv:2402.03300, token by token, with `beta` times an estimate of the KL to the reference.

    With `kl_ratio` the gradient of that estimate is exact (`with_ratio`); without it the estimate is that equation's. `objective`
    clip is PPO's; cispo is -sg(min(r, 1 + clip_high)) A log pi (section 3.1 of arXiv:2506.13585). `ratio` sequence is the
    geometric mean over a completion's tokens (eq. 7 of arXiv:2507.18071). `aggregation` chooses the denominator: the mean over a
    completion's tokens and then over completions (sequence), the mean over all tokens of the global batch (token, section 3.3 of
    arXiv:2503.14476), or the sum over tokens divided by `max_tokens` (constant, arXiv:2503.20783).
    """
    mask, logs = policy.logps.mask, log_ratio(policy)
    r = (mean_over_time(logs, mask)[:, None] if ratio == "sequence" else logs).exp()
    if objective == "cispo":
        values = -r.clamp(max=1 + clip_high).detach() * policy.advantages * policy.logps.values
        clip_acts = r > 1 + clip_high
    else:
        values = clipped(r, policy.advantages, clip_low, clip_high)
        clip_acts = is_clipped(r, policy.advantages, clip_low, clip_high)
    metrics = report(policy, clip_acts)
    if reference is not None:
        divergence = kl(kl_estimator, policy.logps.values, reference.values)
        values = values + beta * (with_ratio(kl_estimator, divergence, logs.exp()) if kl_ratio else divergence)
        metrics["kl"] = Mean.of(divergence, mask)  # per token; other losses on rollouts report it per completion
    values = values * mask
    if aggregation == "token":
        return Loss(values, metrics, per="token")
    if aggregation == "sequence":
        return Loss(mean_over_time(values, mask), metrics)
    assert max_tokens is not None, "check() lets no other case through"
    return Loss(values.sum(-1) / max_tokens, metrics)
