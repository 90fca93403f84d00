"""BCO: a classifier of good and bad completions, whose logit is the implicit reward less its running mean."""

from collections.abc import Mapping
from typing import Annotated

from torch import where
from torch.nn.functional import logsigmoid

from halos.types import Labelled, Loss, Mean, Range

SIDES = ("chosen", "rejected")


def start() -> dict[str, float]:
    """Sums and counts of the rewards of earlier steps, of desirable and of undesirable completions."""
    return {f"{side}/{part}": 0.0 for side in SIDES for part in ("sum", "count")}


def update(
    state: Mapping[str, float], totals: Mapping[str, tuple[float, float]], *, decay: Annotated[float, Range(above=0, most=1)]
) -> dict[str, float]:
    """The state after a step: earlier rewards count `decay` times as much as before it."""
    after = dict(state)
    for side in SIDES:
        added = totals.get(f"rewards/{side}", (0.0, 0.0))
        for part, more in zip(("sum", "count"), added, strict=True):
            after[f"{side}/{part}"] = decay * state[f"{side}/{part}"] + more
    return after


def shift(state: Mapping[str, float]) -> float:
    """Half the sum of the two classes' mean rewards; the mean of one where the other has had none; 0 before the first step, where
    policy and reference are equal."""
    means = [state[f"{side}/sum"] / count for side in SIDES if (count := state[f"{side}/count"]) > 0]
    return sum(means) / max(1, len(means))


def bco(policy: Labelled, reference: Labelled, state: Mapping[str, float], *, beta: Annotated[float, Range(above=0)]) -> Loss:
    """Desirable -log sigmoid(r - d), undesirable -log sigmoid(d - r), of arXiv:2404.04656; r = beta log pi / pi_ref.

    d is the mean of the two classes' mean rewards over earlier steps, without gradient.
    """
    rewards, d, good = beta * (policy.completion.sum - reference.completion.sum), shift(state), policy.desirable
    logps = policy.completion.sum
    metrics = {
        "rewards/chosen": Mean.of(rewards, good),
        "rewards/rejected": Mean.of(rewards, ~good),
        "rewards/shift": Mean.of(rewards.new_full(rewards.shape, d)),
        "logps/chosen": Mean.of(logps, good),
        "logps/rejected": Mean.of(logps, ~good),
    }
    return Loss(-logsigmoid(where(good, rewards - d, d - rewards)), metrics)
