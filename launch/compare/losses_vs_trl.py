"""Compare our losses with TRL's trainers on the same log-probs: values, gradients and metrics as a Markdown table.

    pip install torch==2.13.0 trl==1.16.0 && PYTHONPATH=. python launch/compare/losses_vs_trl.py

No formula of TRL is copied here: the loss methods of its trainers run (trl_replay.py), with a stub for the model. Exit status 1
if two values that should be equal are not.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor
from trl_replay import (
    PAIRS,
    WIDTH,
    Batch,
    Outcome,
    averaged,
    trl_cpo,
    trl_dpo,
    trl_grpo,
    trl_kto,
    trl_reward,
    trl_rloo,
    trl_sft,
)

from halos.losses import cdpo, dpo, grpo, ipo, kto, reward, rloo, sft, simpo, slic
from halos.types import Labelled, Loss, Mismatched, Pair, PairScores, Rollouts

TOLERANCE = 2e-6  # relative, of float32 sums


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    ours: str
    theirs: str
    run_ours: Callable[[], Outcome]
    run_theirs: Callable[[], Outcome]
    why_not: str = ""  # how the conventions differ; empty where the two must be equal
    note: str = ""


def means(loss: Loss) -> dict[str, float]:
    return {name: (mean.total / mean.count).item() for name, mean in loss.metrics.items() if mean.count}


def paired_rows(batch: Batch) -> list[Row]:
    policy, reference = batch.pairs()

    def ours(function: Callable[..., Loss], *pairs: Pair, **hyperparameters: Any) -> Callable[[], Outcome]:
        def run() -> Outcome:
            loss = function(*pairs, **hyperparameters)
            return batch.outcome(loss.values.mean(), means(loss))

        return run

    def one_by_one(loss_type: str, **hyperparameters: float) -> Callable[[], Outcome]:
        """Return TRL's loss of each pair alone, averaged."""

        def run() -> Outcome:
            alone = [batch.rows(slice(i, None, PAIRS)) for i in range(PAIRS)]
            parts = [(trl_cpo if loss_type == "hinge" else trl_dpo)(part, loss_type, **hyperparameters) for part in alone]
            gradient = torch.stack([x.gradient for x in parts], 1).flatten(0, 1) / PAIRS
            return Outcome(torch.stack([x.loss for x in parts]).mean(), gradient, {})

        return run

    both = (policy, reference)
    per_token = "rewards: ours are tau x log-ratio per token (what the loss compares), TRL's beta x whole log-ratio"
    return [
        Row(
            "dpo, beta .1",
            "DPO `sigmoid`",
            ours(dpo.dpo, *both, beta=0.1),
            lambda: trl_dpo(batch, "sigmoid", beta=0.1),
        ),
        Row(
            "ipo, tau .1, mean",
            "DPO `ipo`",
            ours(ipo.ipo, *both, tau=0.1, average="mean"),
            lambda: trl_dpo(batch, "ipo", beta=0.1),
            note=per_token,
        ),
        Row(
            "ipo, tau .1, sum",
            "DPO `ipo`",
            ours(ipo.ipo, *both, tau=0.1, average="sum"),
            lambda: trl_dpo(batch, "ipo", beta=0.1),
            why_not="`sum` is the paper's text; TRL's DPO always divides by length",
        ),
        Row(
            "cdpo, e .2",
            "DPO `aot`, label_smoothing .2, one pair at a time",
            ours(cdpo.cdpo, *both, beta=0.1, label_smoothing=0.2),
            one_by_one("aot", beta=0.1, label_smoothing=0.2),
            note="TRL has no cDPO; AOT of a single pair (nothing to sort) is its formula",
        ),
        Row(
            "cdpo, e .2",
            "DPO `sigmoid`, label_smoothing .2",
            ours(cdpo.cdpo, *both, beta=0.1, label_smoothing=0.2),
            lambda: trl_dpo(batch, "sigmoid", beta=0.1, label_smoothing=0.2),
            why_not="TRL ignores label_smoothing with `sigmoid`: plain DPO",
        ),
        Row(
            "cdpo, e .2",
            "DPO `robust`, label_smoothing .2",
            ours(cdpo.cdpo, *both, beta=0.1, label_smoothing=0.2),
            lambda: trl_dpo(batch, "robust", beta=0.1, label_smoothing=0.2),
            why_not="another loss: the flip term has the other sign, over 1 - 2e",
        ),
        Row(
            "simpo, beta 2, gamma 1",
            "CPO `simpo`, simpo_gamma 1, cpo_alpha 0",
            ours(simpo.simpo, policy, beta=2.0, gamma=1.0, gamma_over_beta=None),
            lambda: trl_cpo(batch, "simpo", beta=2.0, gamma=1.0),
            note="logps: ours are sums, TRL's CPO logs averages here; its default cpo_alpha 1 would add cross-entropy",
        ),
        Row(
            "slic, delta 1, lambda 0",
            "CPO `hinge`, beta 1, cpo_alpha 0",
            ours(slic.slic, policy, delta=1.0, regularization=0.0, average="sum"),
            lambda: trl_cpo(batch, "hinge", beta=1.0),
        ),
        Row(
            "slic, delta 1, lambda .1, mean",
            "CPO `hinge`, beta 1, cpo_alpha .1, one pair at a time",
            ours(slic.slic, policy, delta=1.0, regularization=0.1, average="mean"),
            one_by_one("hinge", beta=1.0, alpha=0.1),
        ),
        Row(
            "slic, delta 1, lambda .1, mean",
            "CPO `hinge`, beta 1, cpo_alpha .1",
            ours(slic.slic, policy, delta=1.0, regularization=0.1, average="mean"),
            lambda: trl_cpo(batch, "hinge", beta=1.0, alpha=0.1),
            why_not="TRL's cross-entropy is a mean over the micro-batch's tokens, ours over pairs",
        ),
        Row(
            "slic, delta 1, lambda 0",
            "DPO `hinge`, beta .1",
            ours(slic.slic, policy, delta=1.0, regularization=0.0, average="sum"),
            lambda: trl_dpo(batch, "hinge", beta=0.1),
            why_not="RSO's hinge, not SLiC: on log-ratios to a reference, scaled by beta",
        ),
    ]


def rollout_rows() -> list[Row]:
    """Losses on rollouts with the same advantages; TRL computes those in its sampling code, outside the loss."""
    batch = Batch.random(6)
    batch = Batch((batch.reference * 0.98).requires_grad_(), batch.reference, batch.mask)  # near the policy that sampled
    advantages = torch.randn(2 * PAIRS, generator=torch.Generator().manual_seed(7))
    plain = {"objective": "clip", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "sequence",
             "max_tokens": None, "beta": 0.0, "kl_estimator": "k3", "kl_ratio": True}  # fmt: skip
    policy = Rollouts(batch.policy_logps, batch.reference, advantages[:, None] * batch.mask, torch.zeros(2 * PAIRS))

    def ours(**hyperparameters: Any) -> Callable[[], Outcome]:
        def run() -> Outcome:
            reference = batch.reference_logps if hyperparameters.get("beta") else None
            loss = grpo.grpo(policy, reference, **{**plain, **hyperparameters})
            count = batch.mask.sum() if loss.per == "token" else len(loss.values)
            return batch.outcome(loss.values.sum() / count, {})

        return run

    def ours_rloo() -> Outcome:
        return batch.outcome(rloo.rloo(policy, clip_low=0.2, clip_high=0.2).values.mean(), {})

    def theirs(**settings: Any) -> Callable[[], Outcome]:
        return lambda: trl_grpo(batch, advantages, **settings)

    gspo = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}
    return [
        Row("grpo", "GRPO `grpo`", ours(), theirs()),
        Row("grpo, beta .04", "GRPO `grpo`, beta .04", ours(beta=0.04), theirs(beta=0.04)),
        Row("grpo, beta .04, kl_ratio false", "GRPO `grpo`, beta .04, use_bias_correction_kl false",
            ours(beta=0.04, kl_ratio=False), theirs(beta=0.04, use_bias_correction_kl=False)),
        Row("dr_grpo", "GRPO `dr_grpo`", ours(aggregation="constant", max_tokens=WIDTH), theirs(loss_type="dr_grpo")),
        Row("dapo", "GRPO `dapo`, epsilon_high .28", ours(aggregation="token", clip_high=0.28),
            theirs(loss_type="dapo", epsilon_high=0.28)),
        Row("gspo", "GRPO `grpo`, importance_sampling_level sequence", ours(**gspo),
            theirs(importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4)),
        Row("cispo", "GRPO `cispo`, epsilon_high 5", ours(objective="cispo", aggregation="token", clip_high=4.0),
            theirs(loss_type="cispo", epsilon_high=5.0), note="our clip_high 4 is a cap of 5 on the ratio, as TRL counts it"),
        Row("rloo", "RLOO", ours_rloo, lambda: trl_rloo(batch, advantages)),
    ]  # fmt: skip


def kto_rows() -> list[Row]:
    batch, labels = Batch.random(3), [i % 3 != 0 for i in range(2 * PAIRS)]
    either = [Batch.random(4), Batch.random(4).turned()]
    below, above = sorted(either, key=lambda other: (other.policy - other.reference).sum().item())  # z0 below 0, and above
    weights = (1.3, 0.8)

    def ours(is_desirable: list[bool], other: Batch) -> Callable[[], Outcome]:
        desirable = torch.tensor(is_desirable)
        given = (Labelled(batch.policy_logps, desirable), Labelled(batch.reference_logps, desirable))
        statistics = kto.statistics(Mismatched(other.policy_logps.detach()), Mismatched(other.reference_logps))

        def run() -> Outcome:
            loss = kto.kto(*given, statistics, beta=0.5, desirable_weight=weights[0], undesirable_weight=weights[1])
            found = means(loss)
            if {"rewards/chosen", "rewards/rejected"} <= found.keys():  # as our trainer, and TRL's, derive it
                found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
            return batch.outcome(loss.values.mean(), found)

        return run

    def theirs(is_desirable: list[bool], other: Batch) -> Callable[[], Outcome]:
        return lambda: trl_kto(batch, other, is_desirable, beta=0.5, weights=weights)

    def in_two() -> Outcome:
        cuts = slice(0, PAIRS), slice(PAIRS, 2 * PAIRS)
        return averaged([trl_kto(batch.rows(cut), above.rows(cut), labels[cut], beta=0.5, weights=weights) for cut in cuts])

    desirable_only = [True] * 2 * PAIRS
    return [
        Row("kto, beta .5, weights 1.3 / .8", "KTO `kto`, one micro-batch", ours(labels, above), theirs(labels, above)),
        Row("kto, z0 clamped at 0", "KTO `kto`, one micro-batch", ours(labels, below), theirs(labels, below)),
        Row(
            "kto, only desirable",
            "KTO `kto`, one micro-batch",
            ours(desirable_only, above),
            theirs(desirable_only, above),
        ),
        Row(
            "kto, two micro-batches",
            "KTO `kto`, two accumulated micro-batches",
            ours(labels, above),
            in_two,
            why_not="z0: ours is the mean over the global batch, TRL's over each micro-batch",
        ),
    ]


def reward_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(5)
    scores = (2 * torch.randn(2 * PAIRS, generator=generator)).requires_grad_()
    margin = torch.rand(PAIRS, generator=generator)

    def ours(margins: Tensor, centering: float) -> Callable[[], Outcome]:
        def run() -> Outcome:
            loss = reward.bradley_terry(PairScores(*scores.chunk(2), margins), centering=centering)
            mean, found = loss.values.mean(), means(loss)
            found["margin"] = found["rewards/margins"]  # TRL's name for it
            return Outcome(mean.detach(), torch.autograd.grad(mean, scores)[0], found)

        return run

    nothing = torch.zeros(PAIRS)
    return [
        Row("bradley_terry, centering 0", "Reward", ours(nothing, 0.0), lambda: trl_reward(scores, None, None)),
        Row("bradley_terry, margin column", "Reward, margin column", ours(margin, 0.0), lambda: trl_reward(scores, margin, None)),
        Row(
            "bradley_terry, margin, centering .01",
            "Reward, center_rewards_coefficient .01",
            ours(margin, 0.01),
            lambda: trl_reward(scores, margin, 0.01),
        ),
    ]


def sft_rows(batch: Batch) -> list[Row]:
    parts = [batch.rows(slice(0, 3)), batch.rows(slice(3, None))]

    def ours() -> Outcome:
        return batch.outcome(sft.sft(batch.policy_logps).values.sum() / batch.mask.sum(), {})

    return [Row("sft, the whole batch", "SFT `nll`, micro-batches of 3 and 13 rows", ours, lambda: trl_sft(parts))]


def far(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) > 1e-5 * max(1.0, abs(theirs))


def compared(row: Row) -> tuple[str, bool]:
    """Return the row in Markdown, and whether its result is the expected one."""
    ours, theirs = row.run_ours(), row.run_theirs()
    off = abs(ours.loss - theirs.loss).item()
    gap = (ours.gradient - theirs.gradient).abs().max().item()
    equal = off <= TOLERANCE * max(1.0, abs(theirs.loss.item())) and gap <= TOLERANCE * max(1.0, theirs.gradient.abs().max())
    shared = sorted(ours.metrics.keys() & theirs.metrics.keys())
    differing = [name for name in shared if far(ours.metrics[name], theirs.metrics[name])]
    metrics = "-" if not shared or not equal else f"{len(shared) - len(differing)} of {len(shared)}"
    verdict = "**equal**" if equal else f"differs: {row.why_not}" if row.why_not else "**DIFFERS, and should not**"
    numbers = f"{ours.loss.item():.7f} | {theirs.loss.item():.7f} | {gap:.0e}"
    return f"| {row.ours} | {row.theirs} | {numbers} | {metrics} | {verdict} | {row.note} |", equal == (not row.why_not)


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    batch = Batch.random(0)
    print(f"halos against TRL {trl.__version__}, torch {torch.__version__}: the same {PAIRS} random pairs, float32\n")
    print("| ours | TRL's trainer | our loss | TRL's loss | largest gradient gap | metrics equal | verdict | note |")
    print("|---|---|---|---|---|---|---|---|")
    right = True
    for row in [*sft_rows(batch), *paired_rows(batch), *kto_rows(), *reward_rows(), *rollout_rows()]:
        line, as_expected = compared(row)
        print(line, flush=True)
        right &= as_expected
    print(
        "\nMetrics are compared where both log one of that name. IPO with sums exists only in TRL's online DPO, inside its step."
    )
    print("TRL's PPO and REINFORCE++ have no loss that can be called outside their training loop (or do not exist).")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
