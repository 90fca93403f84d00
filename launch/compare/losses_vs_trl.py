"""Compare our losses with TRL's trainers on the same log-probs: values, gradients and metrics as a Markdown table.

    pip install torch==2.13.0 trl==1.16.0 && PYTHONPATH=. python launch/compare/losses_vs_trl.py

No formula of TRL is copied here: the loss methods of its trainers run (trl_replay.py), with a stub for the model. Exit status 1
if two values that should be equal are not.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import trl
from parity import Row, means, printed
from parity_pairs import anchored_rows, family_rows, paired_rows
from parity_rollouts import GATE, GSPO, of_clipped, of_grpo
from tensors import PAIRS, WIDTH, Batch, Outcome
from torch import Tensor
from trl_replay import (
    averaged,
    trl_gkd,
    trl_grpo,
    trl_kto,
    trl_reward,
    trl_rloo,
    trl_sft,
)

from halos.losses import dft, gkd, kto, reward, rloo, sft
from halos.types import Labelled, Loss, Mismatched, PairScores


def rollout_rows() -> list[Row]:
    """Losses on rollouts with the same advantages; TRL computes those in its sampling code, outside the loss."""
    drawn = Batch.random(6)
    near, fallen = (Batch((drawn.reference * factor).requires_grad_(), drawn.reference, drawn.mask) for factor in (0.98, 1.02))
    advantages = torch.randn(2 * PAIRS, generator=torch.Generator().manual_seed(7))

    def ours(batch: Batch = near, **keys: Any) -> Callable[[], Outcome]:
        return of_grpo(batch, advantages, **keys)

    def theirs(batch: Batch = near, **settings: Any) -> Callable[[], Outcome]:
        return lambda: trl_grpo(batch, advantages, **settings)

    tight = {"clip_low": 0.01, "clip_high": 0.01}, {"epsilon_low": 0.01, "epsilon_high": 0.01}
    return [
        Row("grpo", "GRPO `grpo`", ours(), theirs()),
        Row("grpo, beta .04", "GRPO `grpo`, beta .04", ours(beta=0.04), theirs(beta=0.04),
            note="kl: TRL logs it times the ratio"),
        Row("grpo, beta .04, kl_ratio false", "GRPO `grpo`, beta .04, use_bias_correction_kl false",
            ours(beta=0.04, kl_ratio=False), theirs(beta=0.04, use_bias_correction_kl=False)),
        Row("dr_grpo", "GRPO `dr_grpo`", ours(aggregation="constant", max_tokens=WIDTH), theirs(loss_type="dr_grpo")),
        Row("dapo", "GRPO `dapo`, epsilon_high .28", ours(aggregation="token", clip_high=0.28),
            theirs(loss_type="dapo", epsilon_high=0.28)),
        Row("gspo", "GRPO `grpo`, importance_sampling_level sequence", ours(**GSPO),
            theirs(importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4)),
        Row("cispo", "GRPO `cispo`, epsilon_high 5", ours(objective="cispo", aggregation="token", clip_low=None, clip_high=4.0),
            theirs(loss_type="cispo", epsilon_high=5.0), note="our clip_high 4 is a cap of 5 on the ratio, as TRL counts it"),
        Row("sapo", "GRPO `sapo`", ours(**GATE), theirs(loss_type="sapo", tau=(1.0, 1.05))),
        Row("grpo, dual_clip 1.03", "GRPO `grpo`, delta 1.03", ours(**tight[0], dual_clip=1.03), theirs(**tight[1], delta=1.03)),
        Row("grpo, off_policy_threshold .03, beta .04", "GRPO `grpo`, off_policy_mask_threshold .03, beta .04",
            ours(fallen, off_policy_threshold=0.03, beta=0.04),
            theirs(fallen, off_policy_mask_threshold=0.03, beta=0.04), note="kl: TRL logs it times the ratio"),
        Row("grpo, entropy_coefficient .1", "GRPO `grpo`, entropy_coef .1",
            ours(entropy_coefficient=0.1), theirs(entropy_coef=0.1)),
        Row("rloo", "RLOO", of_clipped(rloo.rloo, near, advantages), lambda: trl_rloo(near, advantages)),
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
        Row("reward, centering 0", "Reward", ours(nothing, 0.0), lambda: trl_reward(scores, None, None)),
        Row("reward, margin column", "Reward, margin column", ours(margin, 0.0), lambda: trl_reward(scores, margin, None)),
        Row(
            "reward, margin, centering .01",
            "Reward, center_rewards_coefficient .01",
            ours(margin, 0.01),
            lambda: trl_reward(scores, margin, 0.01),
        ),
    ]


def sft_rows(batch: Batch) -> list[Row]:
    parts = [batch.rows(slice(0, 3)), batch.rows(slice(3, None))]

    def ours(loss: Callable[..., Loss]) -> Callable[[], Outcome]:
        return lambda: batch.outcome(loss(batch.policy_logps).values.sum() / batch.mask.sum(), {})

    return [
        Row("sft, the whole batch", "SFT `nll`, micro-batches of 3 and 13 rows", ours(sft.sft), lambda: trl_sft(parts)),
        Row("dft, the whole batch", "SFT `dft`, micro-batches of 3 and 13 rows", ours(dft.dft), lambda: trl_sft(parts, "dft")),
    ]


def distillation_rows() -> list[Row]:
    """Whole distributions over a few ids, of which ours takes the log-probs and TRL's the logits, at temperature 2."""
    student, teacher = 3 * torch.randn(2, 2 * PAIRS, WIDTH, 11, generator=torch.Generator().manual_seed(8))
    student.requires_grad_()
    mask = Batch.random(8).mask

    def ours(beta: float) -> Callable[[], Outcome]:
        def run() -> Outcome:
            logps = [(logits / 2).log_softmax(-1) for logits in (student, teacher)]
            given = (gkd.Distilled(each[..., 0], mask, candidates=each) for each in logps)
            loss = gkd.gkd(*given, beta=beta, tail="drop").values.sum() / mask.sum()
            return Outcome(loss.detach(), torch.autograd.grad(loss, student)[0], {})

        return run

    def theirs(beta: float) -> Callable[[], Outcome]:
        return lambda: trl_gkd(student, teacher, mask, beta=beta, temperature=2.0)

    return [Row(f"gkd, beta {beta:g}, all ids", f"GKD, beta {beta:g}", ours(beta), theirs(beta)) for beta in (0.0, 0.5, 1.0)]


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    batch = Batch.random(0)
    print(f"halos against TRL {trl.__version__}, torch {torch.__version__}: the same {PAIRS} random pairs, float32\n")
    right = printed("TRL's trainer", "TRL's loss", [
        *sft_rows(batch), *paired_rows(batch), *family_rows(batch), *anchored_rows(batch), *kto_rows(), *reward_rows(),
        *rollout_rows(), *distillation_rows(),
    ])  # fmt: skip
    print(
        "\nMetrics are compared where both log one of that name. IPO with sums exists only in TRL's online DPO, inside its step."
    )
    print("TRL's PPO and REINFORCE++ have no loss that can be called outside their training loop (or do not exist).")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
