"""From scored samples to what a loss learns from: pairs, labels or the scores themselves, in HALOs' own records."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from halos.errors import UserError
from halos.rollout.types import EVAL, Row, text_of

PAIRWISE, BINARY, SCALAR = "pairwise", "binary", "scalar"
CLOSE = 1e-12  # scores that differ by less are equal
_TOKENS = ("output_ids", "logps", "vocabulary")


def make(scores: Sequence[Row], *, kind: str, pairing: str, threshold: float | str | None, drop_equal: bool, seed: int) -> tuple[
    list[Row], dict[str, int]
]:  # fmt: skip
    """Feedback rows of scored samples, held-out ones apart, and what was left out and why.

    `threshold`: of pairs the difference that must be exceeded (null: 0); of labels the score from which on a completion is
    desirable, a number, or the mean (null) or median of all scores.
    """
    rows = [row for row in scores if row.get("split") != EVAL]
    known = [row for row in rows if row["reward"] is not None]
    counts = {"without_score": len(rows) - len(known)}
    groups = by_prompt(known)
    equal = [group for group in groups if len(group) > 1 and _spread(group) < CLOSE]
    counts |= {"groups": len(groups), "groups_all_equal": len(equal)}
    said = [row for row in known if text_of(row["output"]).strip()]
    if kind != SCALAR:  # text that is empty cannot be told from the prompt; scores come with tokens, an end token at the least
        counts["empty"] = len(known) - len(said)
    if kind == PAIRWISE:
        made = _pairs(by_prompt(said), pairing, threshold, seed)
    elif kind == BINARY:
        made = _labels(known, said, threshold)
    else:
        kept = [group for group in groups if not (drop_equal and group in equal)]
        made = [_common(row) | {"type": "scalar_feedback"} for group in kept for row in group]
    return made, counts | {"rows": len(made)}


def by_prompt(rows: Iterable[Row]) -> list[list[Row]]:
    """Samples of one prompt together, in the order of the prompts."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row["prompt_id"]), []).append(row)
    return list(groups.values())


def check_threshold(kind: str, threshold: Any) -> float | str | None:
    """The threshold as a number or a word. Raises UserError for what it cannot be."""
    words = ("mean", "median") if kind == BINARY else ()
    if threshold is None or threshold in words:
        return threshold
    takes = "mean, median or a number" if kind == BINARY else "a number"
    try:
        if math.isfinite(number := float(threshold)):
            return number
    except (TypeError, ValueError):
        pass
    raise UserError(f"the threshold of {kind} feedback takes {takes}, not {threshold!r}")


def _pairs(groups: Sequence[list[Row]], pairing: str, threshold: float | str | None, seed: int) -> list[Row]:
    """random: the group shuffled, neighbours are paired. max: the best with the worst. min: the two that are closest."""
    least = float(threshold or 0)
    found = []
    for group in groups:
        dice = random.Random(f"{seed}/{group[0]['prompt_id']}")
        some = sorted(group, key=lambda row: row["sample_id"])
        dice.shuffle(some)  # among equals too none comes first for its place
        for one, other in _chosen(some, pairing, least):
            if text_of(one["output"]) != text_of(other["output"]):
                found.append(pair(one, other, swapped=dice.random() < 0.5))
    return found


def _chosen(some: list[Row], pairing: str, least: float) -> list[tuple[Row, Row]]:
    def differ(one: Row, other: Row) -> bool:
        return abs(one["reward"] - other["reward"]) > max(least, CLOSE)

    if pairing == "random":
        return [(a, b) for a, b in zip(some[::2], some[1::2], strict=False) if differ(a, b)]
    ordered = sorted(some, key=lambda row: row["reward"])
    if pairing == "max":
        return [(ordered[-1], ordered[0])] if differ(ordered[-1], ordered[0]) else []
    pairs = [(b, a) for n, a in enumerate(ordered) for b in ordered[n + 1 :] if differ(b, a)]
    return [min(pairs, key=lambda two: two[0]["reward"] - two[1]["reward"])] if pairs else []


def pair(one: Row, other: Row, *, swapped: bool, first_is_better: bool | None = None) -> Row:
    """A record of two samples of one prompt; label 1 says that output_A is the better one.

    Without rewards `first_is_better` says whether `one` is.
    """
    first, second = (other, one) if swapped else (one, other)
    scored = first.get("reward") is not None and second.get("reward") is not None
    if scored:
        label = int(first["reward"] > second["reward"])
        rewards = {"reward_A": first["reward"], "reward_B": second["reward"],
                   "reward_difference": abs(first["reward"] - second["reward"])}  # fmt: skip
    else:
        label, rewards = int(bool(first_is_better) is not swapped), {}
    return {
        "type": "pairwise_feedback", "prompt_id": one["prompt_id"], "prompt": one["prompt"],
        "output_A": _messages(first), "output_B": _messages(second), "label": label, **rewards,
        "sample_id_A": first["sample_id"], "sample_id_B": second["sample_id"],
        "seed_A": first.get("seed"), "seed_B": second.get("seed"), **_origin(one),
        "cost": (one.get("cost") or 0.0) + (other.get("cost") or 0.0),
    }  # fmt: skip


def _labels(rows: Sequence[Row], said: Sequence[Row], threshold: float | str | None) -> list[Row]:
    if not said:
        return []
    rewards = [row["reward"] for row in rows]
    at = statistics.median(rewards) if threshold == "median" else threshold
    at = statistics.fmean(rewards) if at in (None, "mean") else float(at)  # type: ignore[arg-type]
    return [_common(row) | {"type": "binary_feedback", "label": int(row["reward"] >= at), "threshold": at} for row in said]


def scored(sample: Row, reward: float | None, **facts: Any) -> Row:
    """A sample with its score and where that came from; what scores.jsonl holds."""
    return {**sample, "type": "scalar_feedback", "output": _messages(sample), "reward": reward, **facts}


def _common(row: Row) -> Row:
    tokens = {name: row[name] for name in _TOKENS if name in row}
    about = {name: row[name] for name in ("prompt_id", "sample_id", "prompt", "reward")}
    return {**about, "output": _messages(row), "seed": row.get("seed"), **_origin(row), "cost": row.get("cost") or 0.0, **tokens}


def _origin(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in ("generator", "generator_sha256", "labeller") if name in row}


def _messages(row: Row) -> list[Mapping[str, Any]]:
    output = row["output"]
    return [{"role": "assistant", "content": output}] if isinstance(output, str) else list(output)


def _spread(group: Sequence[Row]) -> float:
    rewards = [row["reward"] for row in group]
    return max(rewards) - min(rewards)
