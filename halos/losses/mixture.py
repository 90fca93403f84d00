"""A mixture: the weighted sum of losses over one forward pass, each with its own denominator and metrics."""

from collections.abc import Mapping
from dataclasses import replace

from halos.types import Loss, LossInput, Pair, TokenLogps


def mixture(losses: Mapping[str, Loss], weights: Mapping[str, float]) -> Loss:
    """sum_i w_i L_i. The metric `loss/NAME` is w_i L_i; a part's own metrics stand under its name, as in dpo/rewards/margins."""
    total = Loss.sum(**{name: _times(weights[name], loss) for name, loss in losses.items()})
    metrics = {f"{name}/{metric}": mean for name, loss in losses.items() for metric, mean in loss.metrics.items()}
    return replace(total, metrics=metrics)


def _times(weight: float, loss: Loss) -> Loss:
    return replace(loss, values=weight * loss.values, parts={name: _times(weight, part) for name, part in loss.parts.items()})


def serves(inputs: type[LossInput], wanted: type[LossInput]) -> bool:
    """Whether a loss on `wanted` can be computed from `inputs`: they are of that type, or pairs, of which one is chosen."""
    return issubclass(inputs, wanted) or (issubclass(inputs, Pair) and wanted is TokenLogps)


def given_to(wanted: type[LossInput], inputs: LossInput) -> LossInput:
    """What a loss on `wanted` takes of `inputs`, which serves it."""
    return inputs.chosen if isinstance(inputs, Pair) and wanted is TokenLogps else inputs


def in_terms_of(inputs: type[LossInput], wanted: type[LossInput], loss: Loss) -> Loss:
    """The loss with denominators that are counted for `inputs`: of pairs the tokens of a demonstration are the chosen ones."""
    if issubclass(inputs, wanted):
        return loss
    per = "chosen_token" if loss.per.endswith("token") else loss.per
    return replace(loss, per=per, parts={name: in_terms_of(inputs, wanted, part) for name, part in loss.parts.items()})
