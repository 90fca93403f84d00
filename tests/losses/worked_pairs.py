"""Formulas of worked.py for losses on pairs and on labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Rows = list[np.ndarray]
Result = tuple[Any, dict[str, Any]]  # values, or None where an example has none; and all else by name
SIDES = ("chosen", "rejected")


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(z, float)))


def loss_of(z: Any) -> Any:
    """-log s(z)."""
    return np.logaddexp(0, -np.asarray(z, float))


def rows(given: Any, part: str = "values") -> Rows:
    """Ragged rows, of a mapping one of its parts."""
    return [np.array(row, float) for row in (given[part] if isinstance(given, Mapping) else given)]


def sums(given: Any) -> np.ndarray:
    return np.array([row.sum() for row in rows(given)])


def means(given: Any) -> np.ndarray:
    return np.array([row.sum() / max(1, len(row)) for row in rows(given)])


def clamped(policy: Any, reference: Any, bounds: Mapping[str, float]) -> Any:
    """Humanline: reference + clamp(policy - reference, low, high), in all parts that are rows of log-probs."""
    if isinstance(policy, Mapping):
        return {name: clamped(part, reference[name], bounds) if name != "desirable" else part for name, part in policy.items()}
    low, high = bounds["low"], bounds["high"]
    return [[r + min(max(p - r, low), high) for p, r in zip(*pair, strict=True)] for pair in zip(policy, reference, strict=True)]


# --- pairs -------------------------------------------------------------------------------------------------------------


def pair(
    value: Callable[[np.ndarray, np.ndarray, Mapping[str, Any]], Any],
    reward: Callable[[np.ndarray, Mapping[str, Any]], Any] = lambda ratio, k: k["beta"] * ratio,
) -> Callable[..., Result]:
    """Of a loss that is a function of D_w and D_l."""

    def formula(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
        chosen, rejected = (sums(policy[side]) - sums(example["reference"][side]) for side in ("chosen", "rejected"))
        k = example["keys"]
        return value(chosen, rejected, k), of_pair(policy, reward(chosen, k), reward(rejected, k))

    return formula


def of_pair(policy: Any, chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    logps = {f"logps/{side}": sums(policy[side]).mean() for side in ("chosen", "rejected")}
    return {"rewards/chosen": np.mean(chosen), "rewards/rejected": np.mean(rejected), **logps, **more}


def smoothed(z: Any, e: float) -> Any:
    return (1 - e) * loss_of(z) + e * loss_of(-z)


def exo(w: Any, r: Any, k: Any) -> Any:
    p, e = sigmoid(k["beta"] * (w - r)), k["label_smoothing"]
    return p * np.log(p / (1 - e)) + (1 - p) * np.log((1 - p) / e)


def discopop(w: Any, r: Any, k: Any) -> Any:
    m, z = sigmoid(k["beta"] * (w - r) / k["tau"]), k["beta"] * (w - r)
    return (1 - m) * loss_of(z) + m * np.exp(-z)


def f_prime(ratio: Any, k: Any) -> Any:
    """f'(u) at log u = ratio, but for constants, bounded at -e^80."""
    if k["divergence"] == "js":
        return k["beta"] * -loss_of(ratio)
    if k["divergence"] == "forward_kl":
        return k["beta"] * -np.exp(np.minimum(-ratio, 80))
    return k["beta"] * -np.exp(np.minimum(-k["alpha"] * ratio, 80)) / k["alpha"]


def per_token(policy: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    chosen, rejected = (
        (sums(policy[side]) - sums(reference[side])) / np.maximum(1, [len(row) for row in policy[side]])
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def ipo(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    k, reference = example["keys"], example["reference"]
    w, r = per_token(policy, reference) if k["average"] == "mean" else (sums(policy[s]) - sums(reference[s]) for s in SIDES)
    return (w - r - 1 / (2 * k["tau"])) ** 2, of_pair(policy, k["tau"] * w, k["tau"] * r)


def dpo_norm(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    (w, r), b = per_token(policy, example["reference"]), example["keys"]["beta"]
    return loss_of(b * (w - r)), of_pair(policy, b * w, b * r)


def ld_dpo(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    """Tokens beyond the shorter length of a pair count alpha."""
    k, ratios = example["keys"], dict[str, np.ndarray]()
    shorter = [min(len(w), len(r)) for w, r in zip(policy["chosen"], policy["rejected"], strict=True)]
    for side in SIDES:
        difference = [p - r for p, r in zip(rows(policy[side]), rows(example["reference"][side]), strict=True)]
        weights = [np.where(np.arange(len(row)) < n, 1, k["alpha"]) for row, n in zip(difference, shorter, strict=True)]
        ratios[side] = np.array([(row * weight).sum() for row, weight in zip(difference, weights, strict=True)])
    w, r = ratios["chosen"], ratios["rejected"]
    return loss_of(k["beta"] * (w - r)), of_pair(policy, k["beta"] * w, k["beta"] * r)


def dpop(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    k, (w, r) = example["keys"], (sums(policy[s]) - sums(example["reference"][s]) for s in SIDES)
    penalty = np.maximum(0, -w)
    loss = loss_of(k["beta"] * (w - r - k["penalty"] * penalty))
    return loss, of_pair(policy, k["beta"] * w, k["beta"] * r, penalties=penalty.mean())


def rpo(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    k, (w, r) = example["keys"], (sums(policy[s]) - sums(example["reference"][s]) for s in SIDES)
    anchor = -means(policy["chosen"])
    loss = loss_of(k["beta"] * (w - r)) + k["alpha"] * anchor
    return loss, of_pair(policy, k["beta"] * w, k["beta"] * r, anchors=anchor.mean())


def wpo(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    """The weight is that of `held`; of an empty completion 1."""
    k, (w, r) = example["keys"], (sums(policy[s]) - sums(example["reference"][s]) for s in SIDES)
    weight = np.prod([np.exp(means(held[s]) - means(rows(held[s], "log_sum_squares"))) for s in SIDES], axis=0)
    return weight * loss_of(k["beta"] * (w - r)), of_pair(policy, k["beta"] * w, k["beta"] * r, weights=weight.mean())


def aot(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    k, reference = example["keys"], example["reference"]
    mine, theirs = (sums(each["chosen"]) - sums(each["rejected"]) for each in (policy, reference))
    w, r = (sums(policy[s]) - sums(reference[s]) for s in SIDES)
    batch = np.array(example["statistics"]).T if "statistics" in example else (mine, theirs)
    return by_rank(mine, *batch, k), of_pair(policy, k["beta"] * w, k["beta"] * r)


def by_rank(mine: np.ndarray, batch: np.ndarray, others: np.ndarray, k: Mapping[str, Any]) -> np.ndarray:
    """Each value against the other sample's of the same rank; where ranks are shared, the mean of the losses."""
    ordered, losses = np.sort(batch), []
    for value in mine:
        first, last = np.searchsorted(ordered, value), np.searchsorted(ordered, value, side="right")
        ranks = range(first, last) if last > first else [min(first, len(ordered) - 1)]
        losses.append(np.mean([smoothed(k["beta"] * (value - np.sort(others)[n]), k["label_smoothing"]) for n in ranks]))
    return np.array(losses)


def aot_unpaired(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    k, (w, r) = example["keys"], (sums(policy[s]) - sums(example["reference"][s]) for s in SIDES)
    return by_rank(w, w, r, k), of_pair(policy, k["beta"] * w, k["beta"] * r)


def simpo(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    k, w, r = example["keys"], means(policy["chosen"]), means(policy["rejected"])
    gamma = k["gamma"] if k["gamma"] is not None else k["beta"] * k["gamma_over_beta"]
    return loss_of(k["beta"] * (w - r) - gamma), of_pair(policy, k["beta"] * w, k["beta"] * r)


def slic(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    k, w, r = example["keys"], sums(policy["chosen"]), sums(policy["rejected"])
    nll = -means(policy["chosen"]) if k["average"] == "mean" else -w
    return np.maximum(0, k["delta"] - w + r) + k["regularization"] * nll, of_pair(policy, w, r)


def cpo(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    k, w, r = example["keys"], sums(policy["chosen"]), sums(policy["rejected"])
    nll = [-k["alpha"] * row for row in rows(policy["chosen"])]
    return {"preference": loss_of(k["beta"] * (w - r)), "nll": nll}, of_pair(policy, k["beta"] * w, k["beta"] * r)


def orpo(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    """log odds = avg - log(1 - e^avg), with avg at most -2^-24."""
    k, averages = example["keys"], [means(policy[side]) for side in SIDES]
    odds = [avg - np.log(-np.expm1(avg)) for avg in (np.minimum(each, -(2.0**-24)) for each in averages)]
    values = {"nll": [-row for row in rows(policy["chosen"])], "odds": k["weight"] * loss_of(odds[0] - odds[1])}
    rewards = [k["weight"] * avg for avg in averages]
    return values, of_pair(policy, *rewards, log_odds_ratio=(odds[0] - odds[1]).mean())


def bco_pair(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    b, (w, r) = example["keys"]["beta"], (sums(policy[s]) - sums(example["reference"][s]) for s in SIDES)
    d = shift(example["state"])
    return loss_of(b * w - d) + loss_of(d - b * r), of_pair(policy, b * w, b * r, **{"rewards/shift": d})


# --- labels ------------------------------------------------------------------------------------------------------------


def shift(state: Mapping[str, float]) -> float:
    """BCO's d: half the sum of the mean rewards of both classes, of one alone its mean, of none 0."""
    known = [state[f"{side}/sum"] / state[f"{side}/count"] for side in SIDES if state[f"{side}/count"]]
    return float(np.mean(known)) if known else 0.0


def of_labels(policy: Any, rewards: np.ndarray, **more: Any) -> dict[str, Any]:
    good, logps = np.array(policy["desirable"]), sums(policy["completion"])
    named = {f"{name}/{side}": each[good == (side == "chosen")].mean()
             for side in SIDES for name, each in (("rewards", rewards), ("logps", logps))}  # fmt: skip
    return {**named, **more}


def kto(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    k, statistics, ratio = example["keys"], example["statistics"], ratio_of(policy, example)
    if isinstance(statistics, Mapping):
        mine = statistics["policy"]
        mine = clamped(mine, statistics["reference"], example["humanline"]) if "humanline" in example else mine
        statistics = sums(mine) - sums(statistics["reference"])
    kl = float(np.mean(statistics))
    z0, b = max(0.0, kl), k["beta"]
    good = k["desirable_weight"] * (1 - sigmoid(b * (ratio - z0)))
    bad = k["undesirable_weight"] * (1 - sigmoid(b * (z0 - ratio)))
    return np.where(policy["desirable"], good, bad), of_labels(policy, b * ratio, kl=kl, z0=z0)


def ratio_of(policy: Any, example: Mapping[str, Any]) -> np.ndarray:
    return sums(policy["completion"]) - sums(example["reference"]["completion"])


def bco(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    if "start" in example:
        return None, {"start": dict.fromkeys((f"{side}/{part}" for side in SIDES for part in ("sum", "count")), 0.0)}
    if "totals" in example:
        decayed = {name: example["keys"]["decay"] * value for name, value in example["state"].items()}
        for name, new in example["totals"].items():
            side = name.removeprefix("rewards/")
            decayed |= {f"{side}/sum": decayed[f"{side}/sum"] + new[0], f"{side}/count": decayed[f"{side}/count"] + new[1]}
        return None, {"after": decayed}
    rewards, d = example["keys"]["beta"] * ratio_of(policy, example), shift(example["state"])
    values = np.where(policy["desirable"], loss_of(rewards - d), loss_of(d - rewards))
    return values, of_labels(policy, rewards, **{"rewards/shift": d})


# --- the table ------------------------------------------------------------------------------------------------------

FORMULAS: dict[str, Callable[..., Result]] = {
    "apo_down": pair(lambda w, r, k: sigmoid(k["beta"] * w) + 1 - sigmoid(k["beta"] * (w - r))),
    "apo_zero": pair(lambda w, r, k: 1 - sigmoid(k["beta"] * w) + sigmoid(k["beta"] * r)),
    "cdpo": pair(lambda w, r, k: smoothed(k["beta"] * (w - r), k["label_smoothing"])),
    "discopop": pair(discopop), "dpo": pair(lambda w, r, k: loss_of(k["beta"] * (w - r))), "exo": pair(exo),
    "f_dpo": pair(lambda w, r, k: loss_of(f_prime(w, k) - f_prime(r, k)), f_prime),
    "hinge": pair(lambda w, r, k: np.maximum(0, 1 - k["beta"] * (w - r))),
    "nca": pair(lambda w, r, k: loss_of(k["beta"] * w) + loss_of(-k["beta"] * w) / 2 + loss_of(-k["beta"] * r) / 2),
    "robust": pair(lambda w, r, k: ((1 - k["label_smoothing"]) * loss_of(k["beta"] * (w - r))
                                    - k["label_smoothing"] * loss_of(-k["beta"] * (w - r))) / (1 - 2 * k["label_smoothing"])),
    "sppo": pair(lambda w, r, k: (w - 1 / (2 * k["beta"])) ** 2 + (r + 1 / (2 * k["beta"])) ** 2),
    "aot": aot, "aot_unpaired": aot_unpaired, "bco": bco, "bco_pair": bco_pair, "cpo": cpo, "dpo_norm": dpo_norm, "dpop": dpop,
    "ipo": ipo, "kto": kto, "ld_dpo": ld_dpo, "orpo": orpo, "rpo": rpo, "simpo": simpo, "slic": slic, "wpo": wpo,
}  # fmt: skip
