"""Whether an engine samples from the policy, by behaviour: its log-probs of tokens beside the policy's own of the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from halos.config.schema import Sampler
from halos.errors import UserError
from halos.rollout.types import Request, Sample

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # ids of a prompt, sampled ids
Rescore = Callable[[Sequence[Pair], float], list[np.ndarray]]  # the policy's own log-probs, at a temperature

PROBES, PROBE_TOKENS = 4, 24
# of probes in turn: at neither are log-probs before temperature right; the hot one makes no token certain, so that other models
# differ, and at the cold one tokens are repeated, so that penalties act
TEMPERATURES = (2.0, 0.7)
# Mean differences of a token's log-prob, in nats. Rounding to bfloat16 gives 0.02 to 0.04, a router that flips somewhat more; a
# weight of the importance of a sample is then still near 1.
WARNED, REFUSED = 0.05, 0.15
CLEAR = 4.0  # times the rounding, by which a policy has moved for certain
SMALLEST = 1e-5  # rounding of float32
ENOUGH = 8  # tokens of a probe
REMEDY = "--logprobs-mode processed_logprobs --generation-config vllm"


@dataclass(frozen=True, slots=True)
class Probe:
    """What an engine answered to the requests of a probe, and the policy's own log-probs of these tokens then."""

    pairs: list[Pair]
    temperatures: list[float]
    given: np.ndarray  # (tokens,), of all answers
    own: np.ndarray

    @property
    def difference(self) -> float:
        return mean_difference(self.given, self.own)


def probe_requests(requests: Sequence[Request]) -> list[Request]:
    """Requests for a few tokens after the first prompts of others, the same at every call."""
    first = list({request.prompt.id: request for request in requests}.values())[:PROBES]
    chosen = [first[number % len(first)] for number in range(PROBES)]
    return [
        replace(each, number=number, seed=number, temperature=TEMPERATURES[number % 2],
                max_new_tokens=min(PROBE_TOKENS, each.max_new_tokens))
        for number, each in enumerate(chosen)
    ]  # fmt: skip


def compared(samples: Sequence[Sample], requests: Sequence[Request], rescore: Rescore) -> Probe:
    """An engine's answers to `probe_requests` beside the policy's own log-probs of them."""
    by_key = {sample.key: sample for sample in samples}
    answers = [by_key[request.key] for request in requests]
    pairs = [(request.ids, answer.ids) for request, answer in zip(requests, answers, strict=True)]
    given = np.concatenate([answer.logps for answer in answers])
    temperatures = [request.temperature for request in requests]
    return Probe(pairs, temperatures, given, np.concatenate(at_temperatures(pairs, temperatures, rescore)))


def refuse_other_policy(probe: Probe, rescore: Rescore, *, where: str, policy: str) -> None:
    """Raises UserError, with the remedy, where an engine's log-probs differ from the policy's by more than rounding; `policy` is
    what it should serve."""
    if probe.difference <= REFUSED:
        return
    raw = mean_difference(probe.given, np.concatenate(rescore(probe.pairs, 1.0)))
    if raw <= min(REFUSED, probe.difference / 2):
        raise UserError(
            f"{where} returns log-probs before temperature, which at any other than 1 are not those of what is sampled: start it"
            " with --logprobs-mode processed_logprobs"
        )
    raise UserError(
        f"{where} does not sample from the policy: its log-probs of {len(probe.given)} tokens are {probe.difference:.2g} nats"
        f" from the policy's own on average (rounding: at most {REFUSED:g}); {_cause(probe)}. Serve {policy}, in the dtype of"
        f" training, with {REMEDY}"
    )


def refuse_previous_policy(probe: Probe, previous: np.ndarray, *, where: str, policy: str) -> None:
    """Raises UserError where an engine's log-probs are those of the round before's policy, though they are near enough to this
    one's: `previous` are that policy's of the same tokens, (tokens,).

    How much of the way between the two policies the engine's are is a least-squares slope: 0 for this policy, 1 for the previous
    one, whatever the engine's rounding adds. Where the policies differ by less than that, nothing can be concluded.
    """
    way, off = previous - probe.own, probe.given - probe.own
    if len(way) < ENOUGH or float(np.abs(way).mean()) < CLEAR * SMALLEST:
        return
    slope = float(off @ way / (way @ way))
    error = math.sqrt(float(np.square(off - slope * way).sum() / ((len(way) - 1) * (way @ way))))
    if slope > 0.5 and error < 0.5 / CLEAR:
        raise UserError(
            f"{where} samples from the policy of the round before: its log-probs of {len(way)} tokens are that policy's, which"
            f" are {float(np.abs(way).mean()):.2g} nats from this round's on average. Serve {policy}, and run the same command"
            " again"
        )


def _cause(probe: Probe) -> str:
    """What the differences look like."""
    repeated = np.concatenate([_is_repeated(*pair) for pair in probe.pairs])
    off = probe.given - probe.own
    # an engine samples what it takes for more likely, so that its log-probs are the higher ones whatever else is wrong with it
    if repeated.any() and not repeated.all() and off[repeated].mean() < -REFUSED / 2 and off[~repeated].mean() > 0:
        return "tokens that occurred before are less likely, as with a repetition penalty, whatever the request states"
    return "it has another model or other weights, quantised ones, or a coarser dtype"


def _is_repeated(prompt: tuple[int, ...], ids: tuple[int, ...]) -> np.ndarray:
    whole = [*prompt, *ids]
    return np.array([token in whole[: len(prompt) + number] for number, token in enumerate(ids)])


class ReloadProof:
    """Whether a server that was given new weights samples from them.

    Once the policy's log-probs of the first probe's tokens have moved by clearly more than the engine's rounding, an answer whose
    log-probs have not is of earlier weights.
    """

    def __init__(self) -> None:
        self._first: Probe | None = None
        self.is_complete = False

    def add(self, probe: Probe, rescore: Rescore, *, where: str) -> None:
        """Raises UserError where the server still samples from earlier weights."""
        if self._first is None:
            self._first = probe
            return
        first, now = self._first, np.concatenate(at_temperatures(self._first.pairs, self._first.temperatures, rescore))
        moved = mean_difference(now, first.own)
        if moved < CLEAR * max(first.difference, SMALLEST):
            return
        self.is_complete = True
        # rounding alone may have a server sample another token, after which the two answers are no longer comparable
        before, after = _shared(first.pairs, probe.pairs)
        if len(before) < ENOUGH:
            return
        if mean_difference(probe.given[after], first.given[before]) < mean_difference(now[before], first.own[before]) / 2:
            raise UserError(
                f"{where} takes new weights without an error and goes on to sample from earlier ones: the policy's log-probs"
                f" moved by {moved:.2g} nats since it was given the first, and its own did not. A live loop needs a vLLM whose"
                " reload_weights reads the directory that it is given (weights_path)"
            )


def _shared(one: Sequence[Pair], other: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """The positions, among all tokens of each, of those that both have after the same tokens."""
    positions, starts = list[tuple[int, int]](), (0, 0)
    for (_, ids), (_, others) in zip(one, other, strict=True):
        differing = (n for n, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b)
        count = next(differing, min(len(ids), len(others)))
        positions += [(starts[0] + n, starts[1] + n) for n in range(count)]
        starts = starts[0] + len(ids), starts[1] + len(others)
    both = np.array(positions, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def mean_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


def warned_above(sampler: Sampler) -> float:
    """The mean difference of rescored samples above which a warning says so. Engines may return log-probs after top_p, which
    raises each by at most -log(top_p), and after top_k, which has no bound."""
    return math.inf if sampler.top_k else WARNED - math.log(sampler.top_p)


def warning(mean: float, largest: float, count: int, bound: float) -> str:
    return (
        f"the sampler's log-probs of {count} samples are {mean:.2g} nats a token from the policy's own on average ({largest:.2g}"
        f" at most), which is more than rounding (up to {bound:.2g}): it samples from another model, other weights or a coarser"
        " dtype"
    )


def evenly(items: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples that have log-probs, at equal distances."""
    known = [each for each in items if each.logps]
    return known[:: max(1, len(known) // count)][:count] if count else []


def differences(samples: Sequence[Sample], prompts: Sequence[tuple[int, ...]], rescore: Rescore) -> np.ndarray:
    """|difference| of every token's log-prob: (tokens,), at the temperature that each was sampled at."""
    pairs = [(prompt, sample.ids) for prompt, sample in zip(prompts, samples, strict=True)]
    own = at_temperatures(pairs, [sample.temperature or 0.0 for sample in samples], rescore)
    return np.abs(np.concatenate([sample.logps for sample in samples]) - np.concatenate(own))


def at_temperatures(pairs: Sequence[Pair], temperatures: Sequence[float], rescore: Rescore) -> list[np.ndarray]:
    """The policy's own log-probs, each at its temperature."""
    found = dict[int, np.ndarray]()
    for temperature in sorted({*temperatures}):
        some = [number for number, each in enumerate(temperatures) if each == temperature]
        found |= zip(some, rescore([pairs[number] for number in some], temperature), strict=True)
    return [found[number] for number in range(len(pairs))]
