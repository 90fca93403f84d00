"""An entropy bonus for the losses on rollouts, whose coefficient may follow a target."""

from typing import Annotated

from halos.types import Loss, Range, Rollouts, ValuedRollouts

Coefficient = Annotated[float, Range(least=0)]


def token_statistics(
    *, entropy_coefficient: Coefficient, entropy_target: Annotated[float | None, Range(above=0)]
) -> tuple[str, ...]:
    """What the loss reads of a token's distribution besides its log-prob: nothing where there is no bonus."""
    return ("entropy",) if entropy_coefficient > 0 or entropy_target is not None else ()


def check(*, entropy_coefficient: float, entropy_target: float | None, entropy_most: float) -> str | None:
    if entropy_target is not None and entropy_coefficient > entropy_most:
        return (
            f"loss.entropy_coefficient={entropy_coefficient:g}, from which it follows loss.entropy_target, is above"
            f" loss.entropy_most={entropy_most:g}: lower one, or raise the other"
        )
    return None


def adapt_entropy(
    coefficient: float,
    entropy: float,
    *,
    entropy_target: float | None,
    entropy_step: Annotated[float, Range(above=0)],
    entropy_most: Annotated[float, Range(above=0)],
) -> float:
    """The coefficient after a step whose mean entropy was `entropy`, in nats per token: higher up to the target, lower above it.

    Section 3.2 of arXiv:2505.22312. Fixed where the target is null.
    """
    if entropy_target is None:
        return coefficient
    return min(max(coefficient + (entropy_step if entropy <= entropy_target else -entropy_step), 0.0), entropy_most)


def with_entropy(loss: Loss, policy: Rollouts | ValuedRollouts, coefficient: float) -> Loss:
    """The loss minus `coefficient` times the mean entropy of the tokens of the global batch, where the entropy is known."""
    entropy = policy.logps.entropy
    if entropy is None:
        return loss
    return Loss.sum(policy=loss, entropy=Loss(-coefficient * entropy * policy.logps.mask, {}, per="token"))
