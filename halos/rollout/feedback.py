"""Turns rollouts into training data: pairs, labels or the scores themselves, in the format of HALOs' files."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halos.config import defaults
from halos.config.schema import Feedback as Settings
from halos.errors import UserError
from halos.examples import Comparison, Example, Judgement, Scored, Turns
from halos.rollout.types import Rollout, Row, Sample, by_prompt

PAIRWISE, BINARY, SCALAR = "pairwise", "binary", "scalar"
EXAMPLES: dict[str, type[Example]] = {PAIRWISE: Comparison, BINARY: Judgement, SCALAR: Scored}  # that each is read as
TAKES = {PAIRWISE: ("pairing", "threshold"), BINARY: ("threshold",), SCALAR: ("drop_equal",)}  # keys that act on each
KEEP, MASK, DROP = "keep", "mask", "drop"  # samples that were cut: online.truncated
CLOSE = 1e-12  # scores that differ by less are equal


@dataclass(frozen=True, slots=True)
class Pair:
    """Two samples of one prompt, one of them better. In files `one` is A and `other` is B, or the reverse where `swapped`."""

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
        """The difference of the scores; None unless both have one."""
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
            "seed_A": first.sample.seed, "seed_B": second.sample.seed,
            **_tokens(first.sample, "A"), **_tokens(second.sample, "B"), **_origin(self.one),
            "cost": self.one.score.cost + self.other.score.cost,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Label:
    """A sample that is desirable, its score being at least the threshold, or not."""

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
    """A sample with its score as the reward. Of a `masked` one nothing is learned, but it counts in its group."""

    rollout: Rollout
    masked: bool = False

    @property
    def prompt_id(self) -> str:
        return self.rollout.prompt.id

    def to_row(self) -> Row:
        return {**_row(self.rollout), "type": "scalar_feedback", **({"masked": True} if self.masked else {})}


Feedback = Pair | Label | Reward


def made_up(kind: str) -> Example:
    """An example of a kind, to try which losses learn from it."""
    asked: Turns = ({"role": "user", "content": "1?"},)
    one, other = (({"role": "assistant", "content": text},) for text in ("1", "2"))
    if kind == PAIRWISE:
        return Comparison(asked, one, other)
    return Judgement(asked, one, True) if kind == BINARY else Scored(asked, one, 1.0)


def rows_per_prompt(kind: str, samples: int, pairing: str, *, by_verdict: bool = False) -> int:
    """How many rows the samples of one prompt give at most. A judge that compares (`by_verdict`) pairs them at random."""
    if kind != PAIRWISE:
        return samples
    return samples // 2 if by_verdict or pairing == "random" else min(1, samples // 2)


def keys_of(kind: str, *, by_verdict: bool) -> tuple[str, ...]:
    """The keys of online.feedback that act on a kind; none on a judge's verdicts (`by_verdict`), which are no scores."""
    return () if by_verdict else TAKES[kind]


def idle_key(settings: Settings, kind: str, *, by_verdict: bool, spelled: Callable[[str], str]) -> str | None:
    """A message about the first key that is not the default and does not act; `spelled` gives a key as the user writes it."""
    default, takes = defaults.section(Settings), keys_of(kind, by_verdict=by_verdict)
    idle = [name for name in ("pairing", "threshold", "drop_equal") if name not in takes]
    changed = [name for name in idle if getattr(settings, name) != getattr(default, name)]
    if not changed:
        return None
    of = f"{kind} feedback, which takes {', '.join(map(spelled, takes))}" if takes else "the verdicts of a judge that compares"
    return f"{spelled(changed[0])} has no effect on {of}: leave it out"


def make(
    rollouts: Sequence[Rollout], settings: Settings, *, kind: str, seed: int, truncated: str = KEEP
) -> tuple[Sequence[Feedback], dict[str, int]]:
    """Feedback from the training rollouts, evaluation ones left out; and counts of what was left out, by reason.

    `truncated`: of samples that were cut. MASK has them in statistics and groups alone: a masked Reward, no pair and no label.

    `settings.threshold`: for pairs the difference that scores must exceed (null: 0); for labels the lowest desirable score, a
    number, or the mean (null) or median of all scores.
    """

    def is_masked(rollout: Rollout) -> bool:
        return truncated == MASK and is_cut(rollout.sample)

    threshold = check_threshold(kind, settings.threshold)
    rows = [rollout.learned for rollout in rollouts if not rollout.prompt.is_eval]
    counts = {} if truncated == KEEP else {"cut": sum(is_cut(rollout.sample) for rollout in rows)}
    rows = [rollout for rollout in rows if truncated != DROP or not is_cut(rollout.sample)]
    with_score = [rollout for rollout in rows if rollout.score.value is not None]
    counts |= {"without_score": len(rows) - len(with_score)}
    groups = by_prompt(with_score)
    counts |= {"groups": len(groups), "groups_all_equal": sum(map(_all_equal, groups))}
    non_empty = [rollout for rollout in with_score if rollout.sample.text.strip()]
    if kind != SCALAR:  # empty text has no tokens to train on; rewards go with the sampled tokens, at least an end token
        counts["empty"] = len(with_score) - len(non_empty)
    result: Sequence[Feedback]
    if kind == PAIRWISE:
        pairs = _pairs(by_prompt(non_empty), settings.pairing, float(threshold or 0), seed)
        result = [pair for pair in pairs if not any(map(is_masked, (pair.one, pair.other)))]
    elif kind == BINARY:
        labels = [each for each in _labels(with_score, non_empty, threshold) if not is_masked(each.rollout)]
        counts["desirable"], result = sum(each.desirable for each in labels), labels
    else:
        kept = [group for group in groups if not (settings.drop_equal and _all_equal(group))]
        result = [Reward(rollout, is_masked(rollout)) for group in kept for rollout in group]
    return result, counts | {"rows": len(result)}


def is_cut(sample: Sample) -> bool:
    """Whether a sample ended at max_new_tokens."""
    return sample.finish == "length"


def all_desirable(counts: Mapping[str, int], threshold: Any) -> str | None:
    """A warning where a statistic of the scores makes every label desirable: they are equal, or most are the lowest."""
    if not counts.get("desirable") or counts["desirable"] < counts["rows"] or threshold not in (None, "mean", "median"):
        return None
    return (
        f"all {counts['rows']} samples are labelled desirable, since none has a score below their {threshold or 'mean'}, right or"
        " wrong: give the threshold (online.feedback.threshold) as a number, such as 0.5"
    )


def nothing_of_cut(count: int, truncated: str) -> str:
    """The end of a message that nothing can be learned from samples, of which `count` were cut."""
    return (
        f"; {count} were cut, of which online.truncated={truncated} lets nothing be learned"
        if count and truncated != KEEP
        else ""
    )


def truncation(truncated: str) -> dict[str, str]:
    """The part of a request that says what becomes of samples that were cut; requests of older versions have none."""
    return {} if truncated == KEEP else {"truncated": truncated}


def check_threshold(kind: str, threshold: Any) -> float | str | None:
    """The threshold as a number, or the name of a statistic. Raises UserError for anything else."""
    names = ("mean", "median") if kind == BINARY else ()
    if threshold is None or threshold in names:
        return threshold
    takes = "mean, median or a number" if kind == BINARY else "a number"
    try:
        if math.isfinite(number := float(threshold)):
            return number
    except (TypeError, ValueError):
        pass
    raise UserError(f"the threshold of {kind} feedback takes {takes}, not {threshold!r}")


def _pairs(groups: Sequence[list[Rollout]], pairing: str, least: float, seed: int) -> list[Pair]:
    """random: shuffle the group, pair neighbours. max: the best with the worst. min: the two whose scores are closest."""
    pairs = []
    for group in groups:
        generator = random.Random(f"{seed}/{group[0].prompt.id}")
        some = sorted(group, key=lambda rollout: rollout.sample.number)
        generator.shuffle(some)  # so that ties are not broken by sample number
        for one, other in _chosen(some, pairing, least):
            if one.sample.text != other.sample.text:
                swapped = generator.random() < 0.5
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


def _labels(with_score: Sequence[Rollout], non_empty: Sequence[Rollout], threshold: float | str | None) -> list[Label]:
    if not non_empty:
        return []
    rewards = [rollout.reward for rollout in with_score]
    lowest = statistics.median(rewards) if threshold == "median" else threshold
    lowest = statistics.fmean(rewards) if lowest is None or lowest == "mean" else float(lowest)
    return [Label(rollout, rollout.reward > lowest - CLOSE, lowest) for rollout in non_empty]


def _row(rollout: Rollout) -> Row:
    sample = rollout.sample
    about = {"prompt_id": rollout.prompt.id, "sample_id": sample.number, "prompt": list(rollout.prompt.turns),
             "reward": rollout.reward}  # fmt: skip
    facts = {"temperature": sample.temperature, "finish": sample.finish}
    return {**about, "output": sample.messages, "seed": sample.seed, **_origin(rollout), "cost": rollout.score.cost,
            **{name: value for name, value in facts.items() if value is not None}, **sample.token_row()}  # fmt: skip


def _tokens(sample: Sample, side: str) -> Row:
    """The tokens that were sampled, which the text need not give again, and why they end there."""
    tokens = {"finish": sample.finish, "output_ids": list(sample.ids) or None, "vocabulary": sample.vocabulary,
              "temperature": sample.temperature}  # fmt: skip
    return {f"{name}_{side}": value for name, value in tokens.items() if value is not None}


def _origin(rollout: Rollout) -> Row:
    origin = {"generator": rollout.sample.generator, "generator_sha256": rollout.sample.weights,
              "labeller": rollout.score.scorer}  # fmt: skip
    return {name: value for name, value in origin.items() if value is not None}


def _all_equal(group: Sequence[Rollout]) -> bool:
    """Whether several samples have equal rewards, and so give no learning signal."""
    rewards = [rollout.reward for rollout in group]
    return len(group) > 1 and max(rewards) - min(rewards) < CLOSE
