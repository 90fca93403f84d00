"""95 % confidence intervals of metrics that are means over prompts, and the names under which metrics.jsonl has them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

LOW, HIGH = "/ci_low", "/ci_high"  # end the names of a metric's bounds
Z = statistics.NormalDist().inv_cdf(0.975)

Bounds = tuple[float, float]


def of_mean(values: Sequence[float]) -> Bounds | None:
    """The interval of the mean of independent values of any scale: mean ± 1.96 s / sqrt(N); None for fewer than two.

    With one value for each prompt, the mean over its samples, this is the error clustered by prompt of arXiv:2411.00640: samples
    of one prompt are no independent observations. By the central limit theorem: too narrow for a handful of prompts.
    """
    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return mean - Z * error, mean + Z * error


def of_rate(values: Sequence[float], samples: int) -> Bounds | None:
    """The interval of the mean of independent values in [0, 1], each a fraction of successes: E. B. Wilson's (1927), of
    `samples` samples in all; None without a value.

    It stays within [0, 1] and has a width where all values are 0 or 1, at which the normal approximation claims certainty. It
    counts as many observations as their spread is worth, N p (1 - p) / var: N, the plain interval, where every value is 0 or 1;
    more, up to `samples`, where samples of one prompt differ.
    """
    if not values:
        return None
    count, rate = len(values), statistics.fmean(values)
    spread, most = statistics.pvariance(values), float(max(samples, count))
    worth = count * rate * (1 - rate)
    observations = float(count) if not worth else min(most, worth / spread) if spread else most
    middle, square = rate + Z**2 / (2 * observations), Z**2 / observations
    reach = Z * math.sqrt(rate * (1 - rate) / observations + square / (4 * observations))
    # at rates of 0 and 1 a bound is the rate itself, which rounding would miss
    low = (middle - reach) / (1 + square) if rate > 0 else 0.0
    high = (middle + reach) / (1 + square) if rate < 1 else 1.0
    return max(0.0, low), min(1.0, high)


def named(metric: str, value: float, bounds: Bounds | None) -> dict[str, float]:
    """A metric with its bounds, as in metrics.jsonl."""
    return {metric: value, **({metric + LOW: bounds[0], metric + HIGH: bounds[1]} if bounds else {})}


def shown(metric: str, metrics: Mapping[str, Any]) -> str:
    """A metric with its interval, for people: `reward 0.52 (0.44 to 0.6)`."""
    low, high = metrics.get(metric + LOW), metrics.get(metric + HIGH)
    bounds = f" ({low:.3g} to {high:.3g})" if low is not None and high is not None else ""
    return f"{metric} {metrics[metric]:.4g}{bounds}"
