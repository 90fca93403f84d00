"""From rollouts to what a loss learns from: pairs, labels or the scores themselves, in HALOs' own records."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halos.config.schema import Feedback as Settings
from halos.errors import UserError
from halos.examples import Comparison, Example, Judgement, Scored
from halos.rollout.types import Rollout, Row, by_prompt

PAIRWISE, BINARY, SCALAR = "pairwise", "binary", "scalar"
EXAMPLES: dict[str, type[Example]] = {PAIRWISE: Comparison, BINARY: Judgement, SCALAR: Scored}  # that each is read as
CLOSE = 1e-12  # scores that differ by less are equal


@dataclass(frozen=True, slots=True)
class Pair:
    """Two samples of one prompt, of which one is better. They are shown as A and B in their order, or `swapped`."""

    one: Rollout
    other: Rollout
    swapped: bool
    one_is_better: bool

    @property
    def prompt_id(self) -> str:
        return self.one.prompt.id

    @property
    def chosen(self) -> Rollout:
        return self.one if self.one_is_better else self.other

    @property
    def rejected(self) -> Rollout:
        return self.other if self.one_is_better else self.one

    @property
    def margin(self) -> float | None:
        """By how much, where both have scores."""
        scores = self.one.score.value, self.other.score.value
        return None if None in scores else abs(self.one.reward - self.other.reward)

    def to_row(self) -> Row:
        first, second = (self.other, self.one) if self.swapped else (self.one, self.other)
        rewards = {} if self.margin is None else {
            "reward_A": first.reward, "reward_B": second.reward, "reward_difference": self.margin
        }  # fmt: skip
        return {
            "type": "pairwise_feedback", "prompt_id": self.prompt_id, "prompt": list(self.one.prompt.turns),
            "output_A": first.sample.messages, "output_B": second.sample.messages,
            "label": int(self.one_is_better is not self.swapped), **rewards,
            "sample_id_A": first.sample.number, "sample_id_B": second.sample.number,
            "seed_A": first.sample.seed, "seed_B": second.sample.seed, **_origin(self.one),
            "cost": self.one.score.cost + self.other.score.cost,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Label:
    """A sample that is desirable, or not: its score is at the threshold at the least."""

    rollout: Rollout
    desirable: bool
    threshold: float

    @property
    def prompt_id(self) -> str:
        return self.rollout.prompt.id

    def to_row(self) -> Row:
        return {**_row(self.rollout), "type": "binary_feedback", "label": int(self.desirable), "threshold": self.threshold}


@dataclass(frozen=True, slots=True)
class Reward:
    """A sample, and its score as it is."""

    rollout: Rollout

    @property
    def prompt_id(self) -> str:
        return self.rollout.prompt.id

    def to_row(self) -> Row:
        return {**_row(self.rollout), "type": "scalar_feedback"}


Feedback = Pair | Label | Reward


def make(rollouts: Sequence[Rollout], settings: Settings, *, kind: str, seed: int) -> tuple[Sequence[Feedback], dict[str, int]]:
    """Feedback of rollouts, held-out ones apart, and what was left out and why.

    `settings.threshold`: of pairs the difference that must be exceeded (null: 0); of labels the score from which on a
    completion is desirable, a number, or the mean (null) or median of all scores.
    """
    threshold = check_threshold(kind, settings.threshold)
    rows = [rollout for rollout in rollouts if not rollout.prompt.is_held_out]
    known = [rollout for rollout in rows if rollout.score.value is not None]
    counts = {"without_score": len(rows) - len(known)}
    groups = by_prompt(known)
    counts |= {"groups": len(groups), "groups_all_equal": sum(map(_all_equal, groups))}
    said = [rollout for rollout in known if rollout.sample.text.strip()]
    if kind != SCALAR:  # text that is empty cannot be told from the prompt; scores come with tokens, an end token at the least
        counts["empty"] = len(known) - len(said)
    made: Sequence[Feedback]
    if kind == PAIRWISE:
        made = _pairs(by_prompt(said), settings.pairing, float(threshold or 0), seed)
    elif kind == BINARY:
        made = _labels(known, said, threshold)
    else:
        kept = [group for group in groups if not (settings.drop_equal and _all_equal(group))]
        made = [Reward(rollout) for group in kept for rollout in group]
    return made, counts | {"rows": len(made)}


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


def _pairs(groups: Sequence[list[Rollout]], pairing: str, least: float, seed: int) -> list[Pair]:
    """random: the group shuffled, neighbours are paired. max: the best with the worst. min: the two that are closest."""
    pairs = []
    for group in groups:
        dice = random.Random(f"{seed}/{group[0].prompt.id}")
        some = sorted(group, key=lambda rollout: rollout.sample.number)
        dice.shuffle(some)  # among equals too none comes first for its place
        for one, other in _chosen(some, pairing, least):
            if one.sample.text != other.sample.text:
                swapped = dice.random() < 0.5
                pairs.append(Pair(one, other, swapped, one_is_better=one.reward > other.reward))
    return pairs


def _chosen(some: list[Rollout], pairing: str, least: float) -> list[tuple[Rollout, Rollout]]:
    def differ(one: Rollout, other: Rollout) -> bool:
        return abs(one.reward - other.reward) > max(least, CLOSE)

    if pairing == "random":
        return [(a, b) for a, b in zip(some[::2], some[1::2], strict=False) if differ(a, b)]
    ordered = sorted(some, key=lambda rollout: rollout.reward)
    if pairing == "max":
        return [(ordered[-1], ordered[0])] if differ(ordered[-1], ordered[0]) else []
    pairs = [(b, a) for n, a in enumerate(ordered) for b in ordered[n + 1 :] if differ(b, a)]
    return [min(pairs, key=lambda two: two[0].reward - two[1].reward)] if pairs else []


def _labels(known: Sequence[Rollout], said: Sequence[Rollout], threshold: float | str | None) -> list[Label]:
    if not said:
        return []
    rewards = [rollout.reward for rollout in known]
    at = statistics.median(rewards) if threshold == "median" else threshold
    at = statistics.fmean(rewards) if at is None or at == "mean" else float(at)
    return [Label(rollout, rollout.reward >= at, at) for rollout in said]


def _row(rollout: Rollout) -> Row:
    sample = rollout.sample
    about = {"prompt_id": rollout.prompt.id, "sample_id": sample.number, "prompt": list(rollout.prompt.turns),
             "reward": rollout.reward}  # fmt: skip
    return {**about, "output": sample.messages, "seed": sample.seed, **_origin(rollout), "cost": rollout.score.cost,
            **sample.token_row()}  # fmt: skip


def _origin(rollout: Rollout) -> Row:
    origin = {"generator": rollout.sample.generator, "generator_sha256": rollout.sample.weights,
              "labeller": rollout.score.scorer}  # fmt: skip
    return {name: value for name, value in origin.items() if value is not None}


def _all_equal(group: Sequence[Rollout]) -> bool:
    """Of several samples, so that they teach nothing about each other."""
    rewards = [rollout.reward for rollout in group]
    return len(group) > 1 and max(rewards) - min(rewards) < CLOSE
