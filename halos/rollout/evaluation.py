"""Metrics of answers to evaluation prompts: rewards, pass@k and win rate, with intervals over prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from halos import intervals
from halos.config.rollout_modules import scorer_class
from halos.config.schema import Online
from halos.rollout import measure
from halos.rollout.feedback import CLOSE
from halos.rollout.types import EVAL, Rollout, by_prompt

WIN_RATE = "win_rate"
SHOWN = ("reward", WIN_RATE)  # and pass@k: in the line of a log


def pass_reward(online: Online) -> float | None:
    """The reward from which an answer passes; None where that is not known, so that there is no pass@k."""
    return online.pass_reward if online.pass_reward is not None else scorer_class(online.scorer.name).full_marks


def ks(online: Online) -> tuple[int, ...]:
    """The k of the pass@k that are measured."""
    return (1, online.eval_samples) if online.eval_samples > 1 and pass_reward(online) is not None else ()


def metric_names(online: Online) -> tuple[str, ...]:
    """The metrics that objective.metric may name."""
    several = [f"avg@{online.eval_samples}"] if online.eval_samples > 1 else []
    return ("reward", "reward/std", *several, *(f"pass@{k}" for k in ks(online)), "length", "cut", "samples", "examples")


def plan_of(online: Online) -> str:
    """How the evaluation prompts are answered, as the end of a line of the header."""
    answers, temperature = online.eval_samples, online.eval_temperature
    if answers == 1:
        return ", answered greedily" if not temperature else f", answered at temperature {temperature:g}"
    least = pass_reward(online)
    passes = f"from the reward {least:g} on an answer passes" if least is not None else "no pass@k without online.pass_reward"
    return f", {answers} answers of each at temperature {temperature:g}; {passes}"


def metrics_of(rollouts: Sequence[Rollout], online: Online) -> dict[str, float]:
    """Metrics of the evaluation; empty where there are no evaluation prompts. Answers without a score count in `without_score`
    alone."""
    answers = measure.of_split(rollouts, EVAL)
    metrics = measure.of_samples(answers, split=EVAL)
    scored = [[each.reward for each in group if each.score.value is not None] for group in by_prompt(answers)]
    rewards = [group for group in scored if group]
    if any(answer.score.problem for answer in answers) or rewards:  # a judge that compares gives no scores
        metrics["without_score"] = sum(answer.score.value is None for answer in answers)
    if not rewards:
        return metrics
    means, samples = [statistics.fmean(group) for group in rewards], sum(map(len, rewards))
    is_rate = all(reward in (0, 1) for group in rewards for reward in group)
    bounds = intervals.of_rate(means, samples) if is_rate else intervals.of_mean(means)
    metrics |= intervals.named("reward", statistics.fmean(means), bounds)
    if online.eval_samples > 1:
        metrics[f"avg@{online.eval_samples}"] = metrics["reward"]  # the field's name
    for k in ks(online):
        metrics |= _passes(rewards, k, float(pass_reward(online) or 0.0))
    return metrics


def _passes(rewards: Sequence[Sequence[float]], k: int, least: float) -> dict[str, float]:
    """pass@k, the mean over prompts with at least k scores: fewer say nothing of k attempts."""
    enough = [group for group in rewards if len(group) >= k]
    rates = [pass_at(len(group), sum(reward > least - CLOSE for reward in group), k) for group in enough]
    return intervals.named(f"pass@{k}", statistics.fmean(rates), intervals.of_rate(rates, sum(map(len, enough)))) if rates else {}


def pass_at(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples passes, from `samples` >= k: eq. 1 of arXiv:2107.03374."""
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def win_rate(rollouts: Sequence[Rollout], first: Sequence[Rollout]) -> dict[str, float]:
    """The chance that an answer is better than one of the first policy to the same prompt, a tie counting as 0.5: of all pairs
    of their samples, then the mean over prompts. Empty where no prompt has scores of both."""

    def scored(some: Sequence[Rollout]) -> dict[str, list[float]]:
        answers = [each for each in measure.of_split(some, EVAL) if each.score.value is not None]
        return {group[0].prompt.id: [each.reward for each in group] for group in by_prompt(answers)}

    now, then = scored(rollouts), scored(first)
    return of_wins([[_won(one, other) for one in now[name] for other in then[name]] for name in now if name in then])


def _won(now: float, then: float) -> float:
    return 0.5 if math.isclose(now, then, abs_tol=CLOSE) else float(now > then)


def of_wins(by_prompt: Iterable[Sequence[float]]) -> dict[str, float]:
    """The win rate with its interval from what each prompt's comparisons were worth: 1, 0.5 or 0."""
    rates = [statistics.fmean(group) for group in by_prompt if group]
    return intervals.named(WIN_RATE, statistics.fmean(rates), intervals.of_rate(rates, len(rates))) if rates else {}


def summary(metrics: Mapping[str, float]) -> list[str]:
    """The most telling metrics with their intervals, each as text."""
    names = [name for name in metrics if name in SHOWN or (name.startswith("pass@") and "/" not in name)]
    return [intervals.shown(name, metrics) for name in names]
