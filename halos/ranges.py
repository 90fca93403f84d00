"""Range: the bounds of a key whose value is a number, as an annotation of its type."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a key, written where its type is: `Annotated[float, Range(above=0)]`. Checked before any model loads."""

    above: float | None = None  # exclusive
    least: float | None = None
    below: float | None = None  # exclusive
    most: float | None = None
    whole_from: float | None = None  # from here on, whole numbers alone

    def violated_by(self, value: float) -> str | None:
        """Return the bounds, as text, that a value violates; None where it is within them."""
        bounds = [
            ("above", self.above, value > (self.above or 0)),
            ("at least", self.least, value >= (self.least or 0)),
        ]
        bounds += [("below", self.below, value < (self.below or 0)), ("at most", self.most, value <= (self.most or 0))]
        bounds += [("whole from", self.whole_from, value < (self.whole_from or 0) or value % 1 == 0)]
        wanted = [f"{word} {bound:g}" for word, bound, _ in bounds if bound is not None]
        return " and ".join(wanted) if any(bound is not None and not good for _, bound, good in bounds) else None
