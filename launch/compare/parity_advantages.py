"""Our advantages beside verl's estimators, over the same rewards of the same groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from parity import Row
from parity_samples import Samples
from tensors import Outcome
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import AdaptiveKLController, compute_rewards
from verl_replay import verl_advantages

from halos.losses import grpo, ppo, reinforce_plus_plus, rloo
from halos.types import Estimates, Sampled, TokenLogps

GRPO = {"baseline": "mean", "advantage_scale": "group", "std_ddof": 1, "epsilon": 1e-6}
UNSCALED = {**GRPO, "advantage_scale": "none"}
RETURNS = {"kl_coefficient": 0.0, "kl_estimator": "k1"}
GAE = {"gamma": 0.99, "gae_lambda": 0.95}
OTHER = 13  # of a prompt that has one sample
ALONE = "of a prompt with one sample ours is 0, as nothing can be compared with it, verl's the reward itself"
DDOF = "ours whitens by the variance of the n tokens, verl by n / (n - 1) of it"


def of_tokens(advantages: Tensor) -> Outcome:
    return Outcome(advantages.square().mean().sqrt(), advantages.float(), {})


def advantage_rows(drawn: Samples) -> list[Row]:
    ours, theirs = (_calls(drawn, which) for which in ("ours", "theirs"))
    alone = tuple("alone" if n == OTHER else group for n, group in enumerate(drawn.groups))
    equal = torch.full_like(drawn.rewards, 0.9), tuple("one" if n < 6 else "other" for n in range(len(alone)))
    return [
        Row("grpo, epsilon 1e-6", "`grpo`", ours(grpo.advantages, **GRPO), theirs("grpo")),
        Row("grpo, epsilon 1e-6", "`grpo_vectorized`", ours(grpo.advantages, **GRPO), theirs("grpo_vectorized")),
        Row("grpo, epsilon 1e-4", "`grpo`", ours(grpo.advantages, **{**GRPO, "epsilon": 1e-4}), theirs("grpo"),
            why_not="our default is TRL's 1e-4"),
        Row("grpo, epsilon 1e-6, rewards of .9 alone", "`grpo`", ours(grpo.advantages, *equal, **GRPO), theirs("grpo", *equal),
            why_not="verl's mean of equal rewards is rounded to float32, and that rounding divided by 1e-6"),
        Row("grpo, epsilon 1e-6, one sample", "`grpo`", ours(grpo.advantages, groups=alone, **GRPO), theirs("grpo", groups=alone),
            why_not=ALONE),
        Row("dr_grpo", "`grpo`, norm_adv_by_std_in_grpo false", ours(grpo.advantages, **UNSCALED),
            theirs("grpo", norm_adv_by_std_in_grpo=False)),
        Row("opo", "`opo`", ours(grpo.advantages, **{**UNSCALED, "baseline": "length"}), theirs("opo")),
        Row("rloo", "`rloo`", ours(rloo.advantages, beta=0.0), theirs("rloo")),
        Row("rloo", "`rloo_vectorized`", ours(rloo.advantages, beta=0.0), theirs("rloo_vectorized")),
        Row("rloo, one sample", "`rloo_vectorized`", ours(rloo.advantages, groups=alone, beta=0.0),
            theirs("rloo_vectorized", groups=alone)),
        Row("rloo, one sample", "`rloo`", ours(rloo.advantages, groups=alone, beta=0.0), theirs("rloo", groups=alone),
            why_not=ALONE),
        *_whitened_rows(drawn),
        *_controlled_rows(),
    ]  # fmt: skip


def _calls(drawn: Samples, which: str) -> Callable[..., Callable[[], Outcome]]:
    """Ours takes a function and its keys, theirs an estimator's name and its keywords; both other rewards and groups."""
    mask = drawn.batch.mask

    def ours(function: Callable[..., Estimates], rewards: Tensor = drawn.rewards, groups: Sequence[str] = drawn.groups,
             times: float = 1.0, returns: bool = False, **keys: Any) -> Callable[[], Outcome]:  # fmt: skip
        numbers = torch.tensor([sorted(set(groups)).index(group) for group in groups])
        reference = drawn.sampled if keys.get("kl_coefficient") else None
        given = Sampled(rewards.double(), numbers, TokenLogps(drawn.batch.reference, mask), reference, drawn.values[1])

        def run() -> Outcome:
            found = function(given, **keys)
            return of_tokens(times * (found.returns if returns else found.advantages))

        return run

    def theirs(name: str, rewards: Tensor = drawn.rewards, groups: Sequence[str] = drawn.groups, returns: bool = False,
               kl: float = 0.0, **more: Any) -> Callable[[], Outcome]:  # fmt: skip
        def run() -> Outcome:
            last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
            given = torch.where(last, rewards[:, None], 0.0)
            given = compute_rewards(given, drawn.batch.reference, drawn.sampled, kl) * mask if kl else given
            return of_tokens(verl_advantages(name, given, mask, groups, **more)[returns] * mask)

        return run

    return ours if which == "ours" else theirs


def _whitened_rows(drawn: Samples) -> list[Row]:
    ours, theirs = (_calls(drawn, which) for which in ("ours", "theirs"))
    count = int(drawn.batch.mask.sum())
    unbiased = {"times": math.sqrt((count - 1) / count)}
    plus, config = reinforce_plus_plus.advantages, {"config": AlgoConfig(gamma=1.0)}
    penalty = {"kl_coefficient": 0.1, "kl_estimator": "k1"}
    gae = {"values": drawn.values[1], "gamma": GAE["gamma"], "lam": GAE["gae_lambda"]}
    return [
        Row("reinforce_plus_plus, times sqrt((n - 1) / n)", "`reinforce_plus_plus`",
            ours(plus, group_baseline=False, **RETURNS, **unbiased), theirs("reinforce_plus_plus", **config)),
        Row("reinforce_plus_plus", "`reinforce_plus_plus`", ours(plus, group_baseline=False, **RETURNS),
            theirs("reinforce_plus_plus", **config), why_not=DDOF),
        Row("reinforce_plus_plus, kl_coefficient .1, times sqrt((n - 1) / n)", "`reinforce_plus_plus`, KL in the reward",
            ours(plus, group_baseline=False, **penalty, **unbiased), theirs("reinforce_plus_plus", kl=0.1, **config)),
        Row("reinforce_plus_plus, group_baseline, times sqrt((n - 1) / n)", "`reinforce_plus_plus_baseline`",
            ours(plus, group_baseline=True, **RETURNS, **unbiased), theirs("reinforce_plus_plus_baseline")),
        Row("reinforce_plus_plus, group_baseline, kl_coefficient .1", "`reinforce_plus_plus_baseline`, KL in the reward",
            ours(plus, group_baseline=True, **penalty, **unbiased), theirs("reinforce_plus_plus_baseline", kl=0.1),
            why_not="ours takes the group's mean of rewards alone and sums the KL from each token on; verl takes the KL of the"
            " whole completion into the reward of each token, and into the mean"),
        Row("ppo, returns", "`gae`, returns", ours(ppo.advantages, returns=True, **RETURNS, **GAE),
            theirs("gae", returns=True, **gae)),
        Row("ppo, times sqrt((n - 1) / n)", "`gae`", ours(ppo.advantages, **RETURNS, **GAE, **unbiased), theirs("gae", **gae)),
        Row("ppo", "`gae`", ours(ppo.advantages, **RETURNS, **GAE), theirs("gae", **gae), why_not=DDOF),
    ]  # fmt: skip


def _controlled_rows() -> list[Row]:
    """The coefficient of the KL in the reward that follows a target, after batches that are far above, near and below it."""
    steps = (9.0, 6.3, 2.0)

    def ours() -> Outcome:
        value = 0.2
        for divergence in steps:
            value = ppo.adapt(value, divergence, 64, kl_target=6.0, kl_horizon=1000)
        return of_tokens(torch.tensor([value]))

    def theirs() -> Outcome:
        controller = AdaptiveKLController(0.2, 6.0, 1000)
        for divergence in steps:
            controller.update(divergence, 64)
        return of_tokens(torch.tensor([controller.value]))

    note = "ours is given nats per completion, verl nats per token"
    return [Row("ppo, kl_target 6", "kl_ctrl adaptive, target_kl 6", ours, theirs, note=note)]
