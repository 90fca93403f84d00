"""Compare our losses and advantages with verl's on the same tensors: values, gradients and metrics as Markdown tables.

    pip install torch==2.13.0 omegaconf tensordict ray 'transformers>=5.5.3,<5.11' codetiming orjson datasets pillow
    pip install --no-deps verl==0.9.1 && PYTHONPATH=. python launch/compare/losses_vs_verl.py

No formula of verl is copied here: its actor's and critic's whole losses run, its estimators of advantages and its correction for
the sampler (verl_replay.py). A difference is shown twice: with our keys on verl's convention, and with each side's own. Exit
status 1 if two values that should be equal are not, or two that should differ do not.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import verl
from parity import Row, printed
from parity_advantages import advantage_rows
from parity_correction import correction_rows
from parity_rollouts import GATE, GSPO, of_clipped, of_grpo, rollouts
from parity_samples import Samples
from tensors import WIDTH, Batch, Outcome
from torch import Tensor
from verl_replay import actor, verl_policy, verl_topk, verl_value

from halos.losses import gkd, ppo, reinforce_plus_plus, rloo
from halos.types import TokenLogps, ValuedRollouts

MEANS = {"sequence": "seq-mean-token-mean", "token": "token-mean", "constant": "seq-mean-token-sum-norm"}
NO_DUAL = 1e9  # verl's clip_ratio_c cannot be switched off
VERL_3 = "verl's dual clip of 3 is always on, ours is `dual_clip`, null by default"


def policy_rows(drawn: Samples) -> list[Row]:
    """Policy losses with the same advantages; the aggregation of ours has verl's name in MEANS."""
    batch, first = drawn.batch, drawn.first_pass
    ours, theirs = (partial(_ours, drawn), partial(_theirs, drawn))
    apart = {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}
    cispo = {"aggregation": "token", "objective": "cispo", "clip_low": None}
    plus, product = (partial(of_clipped, each, advantages=drawn.advantages)
                     for each in (reinforce_plus_plus.reinforce_plus_plus, rloo.rloo))  # fmt: skip
    return [
        *clipped_rows(drawn),
        Row("gspo", "`gspo`, seq-mean-token-mean", ours(**GSPO), theirs("gspo", **apart)),
        Row("gspo, aggregation token", "`gspo`, token-mean", ours(**GSPO, aggregation="token"),
            theirs("gspo", MEANS["token"], **apart)),
        Row("gspo, a log-ratio of 35", "`gspo`, seq-mean-token-mean", ours(drawn.far, **GSPO),
            theirs("gspo", given=drawn.far, **apart),
            why_not="ours bounds each token's log-ratio at 20, verl's their mean at 10"),
        Row("sapo", "`sapo`", ours(**GATE), theirs("sapo")),
        Row("sapo, aggregation token", "`sapo`, token-mean", ours(**GATE, aggregation="token"), theirs("sapo", MEANS["token"]),
            why_not="verl's sapo takes the mean of sequence means whatever loss_agg_mode says"),
        Row("cispo, clip_high 4", "`cispo`, clip_ratio_low 1, clip_ratio_high 4", ours(**cispo, clip_high=4.0),
            theirs("cispo", MEANS["token"], clip_ratio_low=1.0, clip_ratio_high=4.0)),
        Row("cispo, clip_low .2, clip_high .2", "`cispo`", ours(**{**cispo, "clip_low": 0.2}), theirs("cispo", MEANS["token"])),
        Row("cispo, clip_high 4", "`cispo`", ours(**cispo, clip_high=4.0), theirs("cispo", MEANS["token"]),
            why_not="verl bounds the ratio from below too, by default to between .8 and 1.2; the paper from above alone"),
        Row("cispo, first pass", "`gpg`", ours(first, **cispo), theirs("gpg", MEANS["token"], first)),
        Row("reinforce_plus_plus, dual_clip 3", "`vanilla`, token-mean", plus(batch, dual_clip=3.0), theirs(mean=MEANS["token"])),
        Row("rloo, first pass", "`vanilla`, seq-mean-token-sum", product(first), theirs(mean="seq-mean-token-sum", given=first),
            gradient_alone=True),
        Row("rloo, dual_clip 3, a later pass", "`vanilla`, seq-mean-token-sum", product(batch, dual_clip=3.0),
            theirs(mean="seq-mean-token-sum"),
            why_not="ours has one ratio and one clip for a whole completion, verl's are each token's"),
    ]  # fmt: skip


def clipped_rows(drawn: Samples) -> list[Row]:
    """PPO's clip, and what its tokens are averaged over."""
    ours, theirs = (partial(_ours, drawn), partial(_theirs, drawn))
    constant = ours(aggregation="constant", max_tokens=WIDTH, dual_clip=3.0)

    def unscaled() -> Outcome:
        wide = _theirs(drawn, mean=MEANS["constant"], given=padded(drawn.batch, 3))()
        return Outcome(wide.loss, wide.gradient[:, :WIDTH], wide.metrics)

    return [
        Row("grpo, dual_clip 3", "`vanilla`, seq-mean-token-mean", ours(dual_clip=3.0), theirs()),
        Row("grpo", "`vanilla`, seq-mean-token-mean, clip_ratio_c 1e9", ours(), theirs(clip_ratio_c=NO_DUAL)),
        Row("grpo", "`vanilla`, seq-mean-token-mean", ours(), theirs(), why_not=VERL_3),
        Row("grpo, a log-ratio of 35", "`vanilla`, seq-mean-token-mean, clip_ratio_c 1e9", ours(drawn.far),
            theirs(given=drawn.far, clip_ratio_c=NO_DUAL), note="both bound a token's log-ratio at 20"),
        Row("dapo, dual_clip 3", "`vanilla`, clip_ratio_high .28", ours(aggregation="token", clip_high=0.28, dual_clip=3.0),
            theirs(mean=MEANS["token"], clip_ratio_high=0.28)),
        Row("grpo, dual_clip 3", "`vanilla`, token-mean", ours(dual_clip=3.0), theirs(mean=MEANS["token"]),
            why_not="verl's default mean is over all tokens (DAPO's), ours of `grpo` that of the paper"),
        Row("dr_grpo, max_tokens 12, dual_clip 3", "`vanilla`, seq-mean-token-sum-norm, loss_scale_factor 12",
            constant, theirs(mean=MEANS["constant"], loss_scale_factor=WIDTH)),
        Row("dr_grpo, max_tokens 12, dual_clip 3", "`vanilla`, seq-mean-token-sum-norm, in a tensor of 15 tokens",
            constant, unscaled, why_not="without loss_scale_factor verl divides by the width of the tensor"),
    ]  # fmt: skip


def _ours(drawn: Samples, given: Batch | None = None, **keys: Any) -> Callable[[], Outcome]:
    return of_grpo(given or drawn.batch, drawn.advantages, **keys)


def _theirs(
    drawn: Samples, mode: str = "vanilla", mean: str = MEANS["sequence"], given: Batch | None = None, **more: Any
) -> Callable[[], Outcome]:
    return lambda: verl_policy(given or drawn.batch, drawn.advantages, actor(mode, loss_agg_mode=mean, **more))


def padded(batch: Batch, more: int) -> Batch:
    parts = (batch.policy.detach(), batch.reference, batch.mask)
    policy, reference, mask = (torch.nn.functional.pad(part, (0, more)) for part in parts)
    return Batch(policy.requires_grad_(), reference, mask)


def term_rows(drawn: Samples) -> list[Row]:
    """The KL to a reference and the entropy, which verl's actor adds to its policy loss."""
    batch, advantages, first = drawn.batch, drawn.advantages, drawn.first_pass
    token = {"aggregation": "token", "dual_clip": 3.0}

    def theirs(given: Batch = batch, mean: str = MEANS["token"], **more: Any) -> Callable[[], Outcome]:
        return lambda: verl_policy(given, advantages, actor("vanilla", loss_agg_mode=mean, **more), reference=given.reference)

    def with_kl(kind: str, given: Batch = batch) -> Callable[[], Outcome]:
        return theirs(given, use_kl_loss=True, kl_loss_coef=0.04, kl_loss_type=kind)

    def ours(given: Batch = batch, **keys: Any) -> Callable[[], Outcome]:
        return of_grpo(given, advantages, **token, **keys)

    rows = [
        Row(f"dapo, beta .04, kl_estimator {kind}, kl_ratio false", f"`vanilla`, kl_loss_type {kind}",
            ours(beta=0.04, kl_estimator=kind, kl_ratio=False), with_kl(kind)) for kind in ("k1", "k2", "k3")
    ]  # fmt: skip
    return [
        *rows,
        Row("dapo, beta .04", "`vanilla`, kl_loss_type k3", ours(beta=0.04), with_kl("k3"),
            why_not="`kl_ratio`: times pi / pi_old, so that the gradient is that of the KL; verl has no such factor"),
        Row("dapo, beta .04, kl_estimator k2, kl_ratio false", "`vanilla`, kl_loss_type k3+",
            ours(beta=0.04, kl_estimator="k2", kl_ratio=False), with_kl("k3+"), gradient_alone=True,
            note="a verl estimator with + has k2's gradient; kl: ours is k2's value"),
        Row("dapo, beta .04, kl_ratio false, a log-ratio of -4 to the reference", "`vanilla`, kl_loss_type k3",
            ours(drawn.left, beta=0.04, kl_ratio=False), with_kl("k3", drawn.left),
            why_not="verl bounds the value of k3 at 10 a token, and with it the gradient"),
        Row("dapo, entropy_coefficient .1", "`vanilla`, entropy_coeff .1", ours(entropy_coefficient=0.1),
            theirs(entropy_coeff=0.1)),
        Row("grpo, entropy_coefficient .1, first pass", "`vanilla`, seq-mean-token-mean, entropy_coeff .1",
            of_grpo(first, advantages, entropy_coefficient=0.1), theirs(first, MEANS["sequence"], entropy_coeff=0.1),
            why_not="our entropy is averaged over tokens whatever the loss is averaged over, as TRL's; verl's as its loss"),
        *value_rows(drawn),
    ]  # fmt: skip


def value_rows(drawn: Samples) -> list[Row]:
    """PPO's two terms at once. The gradients of log-probs and of values stand side by side."""
    batch, advantages = drawn.batch, drawn.advantages[:, None] * drawn.batch.mask
    values, old, returns = drawn.values

    def both(loss: Tensor, metrics: dict[str, float]) -> Outcome:
        of_policy, of_values = torch.autograd.grad(loss, (batch.policy, values))
        return Outcome(loss.detach(), torch.cat([of_policy, of_values], 1) * batch.mask.repeat(1, 2), metrics)

    def ours(value_clip: float | None) -> Callable[[], Outcome]:
        def run() -> Outcome:
            logps = TokenLogps(batch.policy, batch.mask)
            given = ValuedRollouts(logps, batch.reference, advantages, rollouts(batch, advantages).rewards, values, old, returns)
            keys = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "value_coefficient": 1.0, "entropy_coefficient": 0.0}
            loss = ppo.ppo(given, value_clip=value_clip, **keys)
            found = {name: (mean.total / mean.count).item() for name, mean in loss.metrics.items() if name.startswith("value/")}
            return both(loss.values.sum() / batch.mask.sum(), found)

        return run

    def theirs(clip: float) -> Callable[[], Outcome]:
        def run() -> Outcome:
            critic, metrics = verl_value(values, old, returns, batch.mask, clip)
            policy = verl_policy(batch, advantages, actor("vanilla"))
            whole = both(critic + 0 * batch.policy.sum(), metrics)
            gradient = whole.gradient + torch.cat([policy.gradient, torch.zeros_like(policy.gradient)], 1)
            return Outcome(whole.loss + policy.loss, gradient, metrics)

        return run

    return [
        Row("ppo, dual_clip 3, value_clip .5, value_coefficient 1", "`vanilla` + critic, cliprange_value .5",
            ours(0.5), theirs(0.5)),
        Row("ppo, dual_clip 3, value_clip null, value_coefficient 1", "`vanilla` + critic, cliprange_value 1e9",
            ours(None), theirs(1e9)),
    ]  # fmt: skip


def distillation_rows() -> list[Row]:
    """The loss of each token, for the teacher's likeliest ids alone."""
    student, teacher = 6 * torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(8))
    student.requires_grad_()
    top, scored = teacher.log_softmax(-1).topk(3), torch.ones(1, 6, dtype=torch.bool)

    def ours() -> Outcome:
        read = student.log_softmax(-1).gather(-1, top.indices)
        given = (gkd.Distilled(part[None, :, 0], scored, candidates=part[None]) for part in (read, top.values))
        loss = gkd.gkd(*given, beta=0.0, tail="drop").values.mean()
        return Outcome(loss.detach(), torch.autograd.grad(loss, student)[0], {})

    def theirs(least: float | None) -> Callable[[], Outcome]:
        def run() -> Outcome:
            loss = verl_topk(student, top.values, top.indices, least).mean()
            return Outcome(loss.detach(), torch.autograd.grad(loss, student)[0], {})

        return run

    return [
        Row("gkd, beta 0, top_k 3, tail drop", "`forward_kl_topk`, log_prob_min_clamp null", ours, theirs(None)),
        Row("gkd, beta 0, top_k 3, tail drop", "`forward_kl_topk`", ours, theirs(-10.0),
            why_not="verl bounds log-probs at -10 from below (and then the sum at 0 and at 10)"),
    ]  # fmt: skip


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    drawn = Samples.random(6)
    print(f"halos against verl {verl.__version__}, torch {torch.__version__}: the same 16 samples of 4 prompts, float32\n")
    heads = "verl's `loss_mode`", "verl's loss"
    right = printed(*heads, [*policy_rows(drawn), *term_rows(drawn), *correction_rows(drawn), *distillation_rows()])
    print("\nAdvantages; values are root mean squares.\n")
    right &= printed("verl's `adv_estimator`", "verl's", advantage_rows(drawn), "advantages", "advantage's")
    print(f"\n{READING}")
    return 0 if right else 1


READING = """Metrics are compared where both log one of that name. verl's `ppo_kl` is the mean of log pi_old / pi (k1), our
`approx_kl` that of half the square of it (k2).

verl has no counterpart here of losses on pairs, `max_rl`, `off_policy_threshold`, `clip_low` and `clip_high` of a whole
completion (`rloo`), and of an entropy coefficient that adapts. Ours has none of its losses `geo_mean`, `clip_cov`, `kl_cov`,
`dppo_tv`, `dppo_kl` and `dro`, and of its estimators `grpo_passk`, `gdpo`, `gpg`, `remax` and the optimal token baselines."""


if __name__ == "__main__":
    sys.exit(main())
