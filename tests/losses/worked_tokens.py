"""Formulas of worked.py for losses on tokens, on scores, and on rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.losses.worked_pairs import Result, Rows, clamped, loss_of, rows, sigmoid

# --- tokens and scores -------------------------------------------------------------------------------------------------


def nll(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    metrics = {"logps/completion": np.mean([row.sum() for row in rows(policy)]), "nll": -np.concatenate(rows(policy)).mean()}
    return [-row for row in rows(policy)], metrics


def dft(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    values = [-np.exp(fixed) * row for row, fixed in zip(rows(policy), rows(held), strict=True)]
    return values, nll(policy, example, held)[1]


def humanline(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    bounds, reference = example["keys"], rows(example["reference"])
    ratios = np.concatenate([p - r for p, r in zip(rows(policy), reference, strict=True)])
    beyond = (ratios < bounds["low"]) | (ratios > bounds["high"])
    return rows(clamped(rows(policy), reference, bounds)), {"humanline/clamped": beyond.mean()}


def gkd(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; ids of log-prob -inf count among the others."""
    beta, bucket = example["keys"]["beta"], example["keys"]["tail"] == "bucket"
    values: Rows = []
    masses = []
    for of_teacher, of_policy in zip(example["reference"]["candidates"], policy["candidates"], strict=True):
        tokens = []
        for theirs, mine in zip(of_teacher, of_policy, strict=True):
            said = np.isfinite(theirs)
            p, q = np.exp(np.array(theirs)[said]), np.exp(np.array(mine)[said])
            masses.append(p.sum())
            if bucket:
                p, q = (np.append(each, max(1 - each.sum(), 2.0**-23)) for each in (p, q))
            m = beta * p + (1 - beta) * q
            kl_p, kl_q = (p * np.log(p / m)).sum(), (q * np.log(q / m)).sum()
            tokens.append((p * np.log(p / q)).sum() if beta == 0 else (q * np.log(q / p)).sum() if beta == 1
                          else beta * kl_p + (1 - beta) * kl_q)  # fmt: skip
        values.append(np.array(tokens))
    known = np.concatenate(rows(example["reference"]))
    metrics = {"nll": -np.concatenate(rows(policy)).mean(), "teacher/nll": -np.nanmean(known), "teacher/mass": np.mean(masses)}
    return values, metrics


def prm(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    """-r log s(z) - (1 - r) log s(-z) of each step, r its label."""
    masks = [np.array(row) for row in policy["mask"]]
    scores, labels = ([row[m] for row, m in zip(rows(policy, name), masks, strict=True)] for name in ("scores", "labels"))
    values = [r * loss_of(z) + (1 - r) * loss_of(-z) for z, r in zip(scores, labels, strict=True)]
    z, r = np.concatenate(scores), np.concatenate(labels)
    right = {"good": z[r > 0.5] > 0, "bad": z[r < 0.5] < 0}
    return values, {"accuracy": np.concatenate(list(right.values())).mean(), "score": sigmoid(z).mean(), "label": r.mean(),
                    **{f"accuracy/{name}": each.mean() for name, each in right.items()}}  # fmt: skip


def reward(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    w, r, m = (np.array(policy[name], float) for name in ("chosen", "rejected", "margin"))
    values = loss_of(w - r - m) + example["keys"]["centering"] * (w + r) ** 2
    return values, {"accuracy": (w > r).mean(), "rewards/chosen": w.mean(), "rewards/rejected": r.mean(),
                    "rewards/margins": (w - r).mean()}  # fmt: skip


# --- values of rollouts ------------------------------------------------------------------------------------------------


def estimate(estimator: str, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """A token's KL by k1, k2 or k3, from log-probs of the policy that sampled and the other."""
    d = theirs - mine
    return {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - 1 - d}[estimator]


def surrogate(r: np.ndarray, a: np.ndarray, k: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """-min(r A, clip(r) A), where A < 0 at most -c A with a dual clip c; and whether a clip acts."""
    low, high = 1 - k["clip_low"], 1 + k["clip_high"]
    value, acts = -np.minimum(r * a, np.clip(r, low, high) * a), ((a > 0) & (r > high)) | ((a < 0) & (r < low))
    if k.get("dual_clip") is None:
        return value, acts
    return np.where(a < 0, np.minimum(value, -k["dual_clip"] * a), value), acts | ((a < 0) & (r > k["dual_clip"]))


def logs_of(policy: Any) -> tuple[Rows, Rows, Rows]:
    """log pi, log pi_old and advantages of the tokens that are learned from."""
    logps, old, advantages = (rows(policy, name) for name in ("logps", "old", "advantages"))
    return logps, *([each[: len(p)] for p, each in zip(logps, part, strict=True)] for part in (old, advantages))


def grpo(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    if "sampled" in example:
        return None, group_advantages(example["sampled"], example["keys"])
    k, values, acts, kls, masked = example["keys"], list[Any](), list[np.ndarray](), list[np.ndarray](), list[bool]()
    reference = rows(example["reference"]) if "reference" in example else None
    logps, old, advantages = logs_of(policy)
    for n, (lp, before, a, fixed) in enumerate(zip(logps, old, advantages, rows(held, "logps"), strict=True)):
        log_ratio = lp - before
        r = np.exp(np.full(len(lp), log_ratio.mean()) if k["ratio"] == "sequence" else log_ratio)
        if k["objective"] == "cispo":
            weight, least = np.exp(fixed - before), -np.inf if k["clip_low"] is None else 1 - k["clip_low"]
            bounded = np.clip(weight, least, 1 + k["clip_high"])
            value, act = -bounded * a * lp, bounded != weight
        elif k["objective"] == "sapo":
            tau = np.where(a > 0, k["tau_positive"], k["tau_negative"])
            value, act = -4 / tau * sigmoid(tau * (r - 1)) * a, np.zeros(len(lp), bool)
        else:
            value, act = surrogate(r, a, k)
        limit = k["off_policy_threshold"]
        masked.append(limit is not None and len(lp) > 0 and a[0] < 0 and -log_ratio.mean() > limit)
        value = value * (not masked[-1])
        if reference is not None:
            kls.append(estimate(k["kl_estimator"], lp, reference[n]))
            value = value + k["beta"] * kls[-1] * (r if k["kl_ratio"] else 1)
        whole = {"token": value, "sequence": value.sum() / max(1, len(lp)), "constant": value.sum() / (k["max_tokens"] or 1)}
        values.append(whole[k["aggregation"]])
        acts.append(act)
    ratios = np.concatenate([lp - before for lp, before in zip(logps, old, strict=True)])
    metrics = {"clip_fraction": np.concatenate(acts).mean(), "reward": np.mean(policy["rewards"]),
               "length": np.mean([len(lp) for lp in logps]), "entropy": -np.concatenate(logps).mean(),
               "approx_kl": (ratios**2 / 2).mean(), "off_policy/masked": np.mean(masked),
               **({"kl": np.concatenate(kls).mean()} if kls else {})}  # fmt: skip
    return values, metrics


def ppo(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    if "sampled" in example:
        return None, generalized_advantages(example["sampled"], example["keys"])
    k, values, errors, acts = example["keys"], list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    parts = [rows(policy, name) for name in ("values", "old_values", "returns")]
    for lp, before, a, v, v_old, target in zip(*logs_of(policy), *parts, strict=True):
        value, act = surrogate(np.exp(lp - before), a, k)
        error = (v - target) ** 2
        if k["value_clip"] is not None:
            error = np.maximum(error, (np.clip(v, v_old - k["value_clip"], v_old + k["value_clip"]) - target) ** 2)
        values.append(value + k["value_coefficient"] * error / 2)
        errors.append(error / 2)
        acts.append(act)
    return values, {"value/loss": np.concatenate(errors).mean(), "value/mean": np.concatenate(parts[0]).mean(),
                    "clip_fraction": np.concatenate(acts).mean()}  # fmt: skip


def reinforce_plus_plus(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    if "sampled" in example:
        return None, returns_whitened(example["sampled"], example["keys"])
    k = example["keys"]
    both = [surrogate(np.exp(lp - before), a, k) for lp, before, a in zip(*logs_of(policy), strict=True)]
    return [value for value, _ in both], {"clip_fraction": np.concatenate([act for _, act in both]).mean()}


def rloo(policy: Any, example: Mapping[str, Any], held: Any) -> Result:
    if "sampled" in example:
        return None, leave_one_out(example["sampled"], example["keys"])
    logps, old, advantages = logs_of(policy)
    log_ratios = np.array([min((lp - before).sum(), 20.0) for lp, before in zip(logps, old, strict=True)])
    values, acts = surrogate(np.exp(log_ratios), np.array([a[0] for a in advantages]), example["keys"])
    return values, {"clip_fraction": np.repeat(acts, [len(lp) for lp in logps]).mean()}


# --- advantages --------------------------------------------------------------------------------------------------------


def over_tokens(sampled: Any, advantages: Any) -> Rows:
    return [np.full(len(row), a) for row, a in zip(sampled["old"], advantages, strict=True)]


def of_groups(sampled: Any) -> tuple[np.ndarray, list[np.ndarray], dict[str, Any]]:
    """Rewards, the places of each group, and the share of groups whose rewards are all equal."""
    rewards, groups = np.array(sampled["rewards"], float), np.array(sampled["groups"])
    places = [np.flatnonzero(groups == group) for group in dict.fromkeys(sampled["groups"])]
    return rewards, places, {"groups/all_equal": np.mean([np.ptp(rewards[at]) == 0 for at in places])}


def spread(values: np.ndarray, ddof: int) -> float:
    return float(np.sqrt(((values - values.mean()) ** 2).sum() / max(1, len(values) - ddof))) if np.ptp(values) else 0.0


def group_advantages(sampled: Any, k: Mapping[str, Any]) -> dict[str, Any]:
    rewards, places, metrics = of_groups(sampled)
    lengths, advantages = np.array([len(row) for row in sampled["old"]]), np.zeros(len(rewards))
    for at in places:
        given, mean = rewards[at], rewards[at].mean()
        weights = lengths[at] if k["baseline"] == "length" else np.ones(len(at))
        baseline = (weights * given).sum() / max(1, weights.sum())
        scale = {"group": spread(given, k["std_ddof"]) + k["epsilon"], "batch": spread(rewards, k["std_ddof"]) + k["epsilon"],
                 "mean": mean + k["epsilon"], "none": 1.0}[k["advantage_scale"]]  # fmt: skip
        means_nothing = (np.ptp(given) == 0 and k["baseline"] == "mean") or (k["advantage_scale"] == "mean" and mean <= 0)
        advantages[at] = 0.0 if means_nothing else (given - baseline) / scale
    return {"advantages": over_tokens(sampled, advantages), **metrics, "advantages/std": advantages.std()}


def log_ratios(sampled: Any) -> Rows:
    """log pi_old / pi_ref of each token; none without a reference."""
    old = rows(sampled["old"])
    theirs = rows(sampled["reference"]) if "reference" in sampled else old
    return [mine - other[: len(mine)] for mine, other in zip(old, theirs, strict=True)]


def kl_of(ratios: Rows) -> dict[str, Any]:
    """The mean over completions that are learned from."""
    sums = [row.sum() for row in ratios if len(row)]
    return {"kl": np.mean(sums)} if sums else {}


def whitened(parts: Rows) -> Rows:
    """With mean 0 and variance 1 over all tokens."""
    tokens = np.concatenate(parts)
    return [(part - tokens.mean()) / np.sqrt(tokens.var() + 1e-8) for part in parts] if len(tokens) else parts


def generalized_advantages(sampled: Any, k: Mapping[str, Any]) -> dict[str, Any]:
    rewards, _, metrics = of_groups(sampled)
    values, ratios, advantages = rows(sampled["values"]), log_ratios(sampled), list[np.ndarray]()
    for total, v, ratio in zip(rewards, values, ratios, strict=True):
        given, after, out = -k["kl_coefficient"] * ratio, 0.0, np.zeros(len(v))
        given[-1:] += total
        for t in reversed(range(len(v))):
            delta = given[t] + k["gamma"] * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t]
            out[t] = after = delta + k["gamma"] * k["gae_lambda"] * after
        advantages.append(out)
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    flat, guessed = np.concatenate(returns), np.concatenate(values)
    explained = {"value/explained_variance": 1 - (flat - guessed).var() / max(flat.var(), 1e-8)} if len(flat) else {}
    return {"advantages": whitened(advantages), "returns": returns, **metrics, **kl_of(ratios), **explained}


def returns_whitened(sampled: Any, k: Mapping[str, Any]) -> dict[str, Any]:
    rewards, places, metrics = of_groups(sampled)
    for at in places if k["group_baseline"] else ():
        rewards[at] -= rewards[at].mean()
    ratios = log_ratios(sampled)
    returns = [total - k["kl_coefficient"] * ratio[::-1].cumsum()[::-1] for total, ratio in zip(rewards, ratios, strict=True)]
    return {"advantages": whitened(returns), **metrics, **kl_of(ratios)}


def leave_one_out(sampled: Any, k: Mapping[str, Any]) -> dict[str, Any]:
    """R_i less the mean of the others', and the same of the log-ratio to the reference, of the others that have one."""
    rewards, places, metrics = of_groups(sampled)
    ratios = log_ratios(sampled)
    known, advantages = np.array([row.sum() if len(row) else np.nan for row in ratios]), np.zeros(len(rewards))
    for at in places:
        for i in at:
            others = at[at != i]
            if not len(others):
                continue
            rest = known[others][~np.isnan(known[others])]
            kl = 0.0 if np.isnan(known[i]) else known[i] - (rest.mean() if len(rest) else 0.0)
            advantages[i] = rewards[i] - rewards[others].mean() - k["beta"] * kl
    return {"advantages": over_tokens(sampled, advantages), **metrics, **kl_of(ratios), "advantages/std": advantages.std()}


FORMULAS: dict[str, Callable[..., Result]] = {
    "sft": nll, "csft": nll, "dft": dft, "humanline": humanline, "gkd": gkd, "prm": prm, "reward": reward,
    "grpo": grpo, "ppo": ppo, "reinforce_plus_plus": reinforce_plus_plus, "rloo": rloo,
}  # fmt: skip
