"""Mixtures: how many examples of an epoch are drawn from each source, by weights, counts or passes over the sources."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from halos.data.sources import Source
from halos.errors import UserError


class Amount(NamedTuple):
    """How much of an epoch is drawn from a source, by at most one of these; by none of them all of it, once."""

    weight: float | None = None  # in proportion to those of the other sources
    count: int | None = None  # examples
    epochs: float | None = None  # passes over the source

    @classmethod
    def of(cls, source: Source) -> "Amount":
        return cls(source.weight, source.count, source.epochs)

    def examples(self, size: int) -> int:
        """Return the number of examples in an epoch of a source of so many, but for one with a weight."""
        return self.count if self.count is not None else round(size * (1 if self.epochs is None else self.epochs))


def refuse_unmixable(sources: Sequence[Source], rule: str) -> None:
    """Raises UserError for entries of data.train whose amounts do not fit together under a rule of data.weights."""
    weighted = [source for source in sources if source.weight is not None]
    counted = [source for source in sources if source.count is not None or source.epochs is not None]
    if rule == "rows":
        if counted:
            raise UserError(
                f"data entry {counted[0].path}: data.weights=rows is the rule of earlier versions, which had weights alone:"
                " give count and epochs with data.weights=share"
            )
        return
    if weighted and len(sources) == 1:
        weight = weighted[0].weight
        raise UserError(
            f"data entry {weighted[0].path}: weight={weight:g} is a share of the examples, and there is no other entry to share"
            f" them with: epochs: {weight:g} draws so many passes over it in an epoch, count so many examples"
        )
    if weighted and len(weighted) < len(sources):
        other = next(source for source in sources if source.weight is None)
        raise UserError(
            f"data.train: {weighted[0].path} has a weight and {other.path} has none: weights are shares of the examples, so give"
            " every entry one, or none; epochs (passes over an entry in an epoch) and count (examples) need no others"
        )


def per_epoch(sizes: Sequence[int], amounts: Sequence[Amount], names: Sequence[str]) -> list[int]:
    """Return how many examples of an epoch are drawn from each source, which has so many.

    With weights an epoch has as many examples as all sources together, shared out by largest remainders, of equal ones the
    first. Raises UserError, with the source's name, where one would get none.
    """
    if any(amount.weight is not None for amount in amounts):
        wanted = _shared_out(sum(sizes), [amount.weight or 0.0 for amount in amounts])
    else:
        wanted = [amount.examples(size) for size, amount in zip(sizes, amounts, strict=True)]
    for name, amount, count in zip(names, amounts, wanted, strict=True):
        if not count:
            given = f"epochs={amount.epochs:g}" if amount.weight is None else f"weight={amount.weight:g}"
            raise UserError(
                f"data.train: {given} of {name} leaves none of its examples in an epoch of {sum(wanted)}: increase it, or leave"
                " the entry out"
            )
    return wanted


def _shared_out(total: int, weights: Sequence[float]) -> list[int]:
    exact = [Fraction(weight) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    shares = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda number: shares[number] - quotas[number])  # stable
    for number in by_remainder[: total - sum(shares)]:
        shares[number] += 1
    return shares
