"""Evaluation answers: pass@k, intervals over prompts, and the win rate against the first policy."""

import statistics
from collections.abc import Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest

from halos.rollout import evaluation
from halos.rollout.types import Prompt, Rollout, Sample, Score

ASKED = ({"role": "user", "content": "?"},)


def answers(*rewards: Sequence[float | None], problem: str = "raised") -> list[Rollout]:
    """Answers to one prompt for each of `rewards`."""
    return [
        Rollout(Sample(Prompt(str(prompt), ASKED, "eval"), n, "so", "length" if n else "stop", 3), Score(reward, problem))
        for prompt, group in enumerate(rewards)
        for n, reward in enumerate(group)
    ]


def settings(samples: int, least: float | None = None, scorer: str = "function") -> Any:
    return SimpleNamespace(eval_samples=samples, eval_temperature=0.7, pass_reward=least, scorer=SimpleNamespace(name=scorer))


def test_pass_at_k_is_the_share_of_choices_of_k_samples_with_a_pass() -> None:
    for samples in range(1, 7):
        for passed in range(samples + 1):
            for k in range(1, samples + 1):
                chosen = list(combinations([1] * passed + [0] * (samples - passed), k))
                share = statistics.fmean(any(each) for each in chosen)
                assert evaluation.pass_at(samples, passed, k) == pytest.approx(share, abs=1e-12)


def test_rewards_and_passes_are_means_over_prompts() -> None:
    metrics = evaluation.metrics_of(answers([1, 0, 0, 1], [0, 0, 0, 0], [2, 1, 1, 2]), settings(4))
    assert metrics["reward"] == metrics["avg@4"] == pytest.approx((0.5 + 0 + 1.5) / 3)
    assert metrics["pass@1"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert metrics["pass@4"] == pytest.approx(2 / 3)
    assert metrics["cut"] == 0.75
    low, high = metrics["reward/ci_low"], metrics["reward/ci_high"]
    error = statistics.stdev([0.5, 0, 1.5]) / 3**0.5
    assert (low, high) == pytest.approx((2 / 3 - 1.959964 * error, 2 / 3 + 1.959964 * error), abs=1e-6)
    assert metrics["pass@4/ci_low"] == pytest.approx(0.2076596, abs=1e-6), "Wilson's for 2 of 3"
    assert evaluation.metrics_of(answers([7, 2], [9, 9]), settings(2, 7.0))["pass@1"] == 0.75
    assert evaluation.metrics_of(answers([0.1 + 0.2], [0.3]), settings(1))["reward"] == pytest.approx(0.3)


def test_one_answer_of_each_prompt_has_an_interval_and_no_pass_rate() -> None:
    metrics = evaluation.metrics_of(answers([1], [0], [1], [1]), settings(1))
    assert (metrics["reward/ci_low"], metrics["reward/ci_high"]) == pytest.approx((0.3006418, 0.9544127), abs=1e-6)
    assert not [name for name in metrics if "@" in name]


def test_the_scale_of_a_judge_is_its_own() -> None:
    some = answers([8, 3], [9, 9])
    assert not [name for name in evaluation.metrics_of(some, settings(2, scorer="judge")) if "pass@" in name]
    assert evaluation.metrics_of(some, settings(2, 8.0, scorer="judge"))["pass@1"] == 0.75


def test_answers_without_a_score_are_counted_and_no_failures() -> None:
    metrics = evaluation.metrics_of(answers([1, None], [0, 0], [1, 1], [None, None]), settings(2))
    assert metrics["without_score"] == 3
    assert metrics["reward"] == pytest.approx(2 / 3)
    assert metrics["pass@1"] == pytest.approx(2 / 3)
    assert metrics["pass@2"] == 0.5, "of the two prompts with two scores"
    assert evaluation.metrics_of(answers([None]), settings(1))["without_score"] == 1
    assert "without_score" not in evaluation.metrics_of(answers([None], problem=""), settings(1)), "a judge that compares"


def test_the_objective_may_be_any_metric_that_is_measured() -> None:
    for each in (settings(1), settings(4), settings(4, scorer="judge"), settings(4, 7.0, scorer="judge")):
        some = answers(*[[1.0] * each.eval_samples] * 3)
        measured = {name for name in evaluation.metrics_of(some, each) if "/ci_" not in name and name != "without_score"}
        assert {*evaluation.metric_names(each)} == measured | {"examples"}


def test_the_win_rate_compares_every_answer_with_every_one_of_the_first_policy() -> None:
    first, now = answers([0, 1], [1, 1], [0]), answers([1, 1], [0, 1], [None])
    assert evaluation.win_rate(now, first)["win_rate"] == pytest.approx(((1 + 0.5) / 2 + (0 + 0.5) / 2) / 2)
    assert evaluation.win_rate(first, first)["win_rate"] == 0.5
    assert evaluation.win_rate(answers([2, 0, 1, 1]), answers([1]))["win_rate"] == 0.5
    assert evaluation.win_rate([], first) == {}


def test_a_near_tie_counts_half_in_either_direction() -> None:
    """Sums of the same parts in another order: 0.1 + 0.2 and 0.3, or nothing at all."""
    for one, other in ((0.3, 0.1 + 0.2), (0.0, 0.1 + 0.2 - 0.3)):
        before, now = answers([one]), answers([other])
        assert evaluation.win_rate(now, before)["win_rate"] == evaluation.win_rate(before, now)["win_rate"] == 0.5
    assert evaluation.win_rate(answers([0.31]), answers([0.3]))["win_rate"] == 1.0
