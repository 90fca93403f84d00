"""Losses on pairs beside those of TRL's DPO, CPO and ORPO trainers."""

from collections.abc import Callable
from typing import Any

import torch
from parity import Row, means
from tensors import PAIRS, Batch, Outcome
from trl_replay import trl_cpo, trl_dpo, trl_orpo

from halos.losses import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco,
    bco_pair,
    cdpo,
    cpo,
    discopop,
    dpo,
    dpo_norm,
    exo,
    f_dpo,
    hinge,
    ipo,
    ld_dpo,
    nca,
    orpo,
    robust,
    rpo,
    sft,
    simpo,
    slic,
    sppo,
    wpo,
)
from halos.types import Loss, Pair, TokenLogps


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
            return _averaged(parts)

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


def anchored_rows(batch: Batch) -> list[Row]:
    """Sums of DPO and others, which are several loss_types of TRL's."""
    both, chosen = batch.pairs(), batch.mask[:PAIRS].sum()

    def ours_rpo() -> Outcome:
        return batch.outcome(rpo.rpo(*both, beta=0.1, alpha=1.0).values.mean(), {})

    def ours_mpo() -> Outcome:
        bco_loss = bco_pair.bco_pair(*both, bco.start(), beta=0.1).values.mean()
        return batch.outcome(0.8 * dpo.dpo(*both, beta=0.1).values.mean() + 0.2 * bco_loss
                             + sft.sft(both[0].chosen).values.sum() / chosen, {})  # fmt: skip

    def theirs(given: Batch, **weights: float) -> Outcome:
        return trl_dpo(given, "", beta=0.1, loss_types=list(weights), loss_weights=list(weights.values()))

    def one_by_one() -> Outcome:
        return _averaged([theirs(batch.rows(slice(i, None, PAIRS)), sigmoid=1.0, sft=1.0) for i in range(PAIRS)])

    return [
        Row("rpo, beta .1, alpha 1", "DPO `sigmoid` + `sft`, one pair at a time", ours_rpo, one_by_one),
        Row("rpo, beta .1, alpha 1", "DPO `sigmoid` + `sft`", ours_rpo, lambda: theirs(batch, sigmoid=1.0, sft=1.0),
            why_not="TRL's cross-entropy is a mean over the micro-batch's tokens, ours (the paper's) over pairs"),
        Row("mpo, first step", "DPO .8 `sigmoid` + .2 `bco_pair` + `sft`", ours_mpo,
            lambda: theirs(batch, sigmoid=0.8, bco_pair=0.2, sft=1.0)),
    ]  # fmt: skip


def _averaged(parts: list[Outcome]) -> Outcome:
    """Of the pairs one by one."""
    gradient = torch.stack([each.gradient for each in parts], 1).flatten(0, 1) / PAIRS
    return Outcome(torch.stack([each.loss for each in parts]).mean(), gradient, {})


def family_rows(batch: Batch) -> list[Row]:
    """The losses that are settings of TRL's DPO trainer, and ORPO and CPO."""
    policy, reference = batch.pairs()
    half, draws = PAIRS, batch.policy.detach() / 2  # a stand-in for log sum p^2
    sides = [
        TokenLogps(batch.policy[cut], batch.mask[cut], log_sum_squares=draws[cut]) for cut in (slice(half), slice(half, None))
    ]
    weighted = wpo.WeightedPair(*sides)

    def mean(loss: Loss) -> Outcome:
        counts = {"item": PAIRS, "token": batch.mask.sum(), "chosen_token": batch.mask[:half].sum()}
        total = torch.stack([term.values.sum() / counts[term.per] for term in loss.terms.values()]).sum()
        return batch.outcome(total, means(loss))

    def row(name: str, theirs: str, ours: Callable[..., Loss], *given: Any, **settings: Any) -> Row:
        smoothing = {key: settings[key] for key in ("label_smoothing",) if key in settings}
        loss_type, more = theirs.partition(" ")[0], settings.pop("trl", {})
        return Row(name, f"DPO `{theirs}`", lambda: mean(ours(*given, **settings)),
                   lambda: trl_dpo(batch, loss_type, beta=settings["beta"], **smoothing, **more))  # fmt: skip

    both = (policy, reference)
    sorted_pairs = (*both, aot.statistics(*both).detach())
    later = bco.update(bco.start(), {"rewards/chosen": (2.0, 4.0), "rewards/rejected": (-1.0, 4.0)}, decay=1.0)
    sorted_sides = (*both, aot_unpaired.statistics(*both).detach())
    return [
        row("robust, e .1", "robust", robust.robust, *both, beta=0.1, label_smoothing=0.1),
        row("hinge, beta .1", "hinge", hinge.hinge, *both, beta=0.1),
        row("exo, e .01", "exo_pair", exo.exo, *both, beta=0.1, label_smoothing=0.01),
        row("nca, beta .1", "nca_pair", nca.nca, *both, beta=0.1),
        row("apo_zero, beta .1", "apo_zero", apo_zero.apo_zero, *both, beta=0.1),
        row("apo_down, beta .1", "apo_down", apo_down.apo_down, *both, beta=0.1),
        row("bco_pair, first step", "bco_pair", bco_pair.bco_pair, *both, bco.start(), beta=0.1),
        Row("bco_pair, a later step", "DPO `bco_pair`", lambda: mean(bco_pair.bco_pair(*both, later, beta=0.1)),
            lambda: trl_dpo(batch, "bco_pair", beta=0.1), why_not="TRL's subtracts no running mean of the rewards"),
        row("sppo, beta .1", "sppo_hard", sppo.sppo, *both, beta=0.1),
        row("aot, e .1", "aot", aot.aot, *sorted_pairs, beta=0.1, label_smoothing=0.1),
        row("aot_unpaired, e .1", "aot_unpaired", aot_unpaired.aot_unpaired, *sorted_sides, beta=0.1, label_smoothing=0.1),
        row("dpo_norm, beta 5", "sigmoid_norm", dpo_norm.dpo_norm, *both, beta=5.0),
        row("discopop, tau .05", "discopop", discopop.discopop, *both, beta=0.1, tau=0.05, trl={"discopop_tau": 0.05}),
        row("ld_dpo, alpha .5", "sigmoid ld_alpha .5", ld_dpo.ld_dpo, *both, beta=0.1, alpha=0.5, trl={"ld_alpha": 0.5}),
        row("f_dpo, js", "sigmoid js_divergence", f_dpo.f_dpo, *both, beta=0.1, divergence="js", alpha=None,
            trl={"f_divergence_type": "js_divergence"}),
        row("f_dpo, forward_kl", "sigmoid forward_kl", f_dpo.f_dpo, *both, beta=0.1, divergence="forward_kl", alpha=None,
            trl={"f_divergence_type": "forward_kl"}),
        row("f_dpo, alpha .3", "sigmoid alpha_divergence .7", f_dpo.f_dpo, *both, beta=0.1, divergence="alpha", alpha=0.3,
            trl={"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}),
        row("wpo, beta .1", "sigmoid use_weighting", wpo.wpo, weighted, reference, beta=0.1,
            trl={"use_weighting": True, "log_sum_squares": draws}),
        Row("orpo, lambda .1", "ORPO, beta .1", lambda: mean(orpo.orpo(policy, weight=0.1)), lambda: trl_orpo(batch, beta=0.1),
            note="TRL's cross-entropy counts the prompt's tokens too; here the prompt is one token, which has none"),
        Row("cpo, beta .1, alpha 1", "CPO `sigmoid`, cpo_alpha 1", lambda: mean(cpo.cpo(policy, beta=0.1, alpha=1.0)),
            lambda: trl_cpo(batch, "sigmoid", beta=0.1, alpha=1.0), note="logps and rewards: TRL's CPO logs averages here"),
    ]  # fmt: skip
