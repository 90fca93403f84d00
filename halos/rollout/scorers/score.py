"""What a labeller gives back, and what it is asked about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from halos.rollout.types import Row


@dataclass(frozen=True, slots=True)
class Score:
    """A sample's score; None where there is none, and then why."""

    value: float | None
    problem: str = ""
    cost: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict)  # such as the parts of a composition
    lacking: tuple[str, ...] = ()  # columns that a function asked for and the sample does not have, where it raised


class Labeller(Protocol):
    """Scores samples one by one, in whatever order."""

    def name(self) -> str:
        """What feedback rows say of where their scores come from."""
        ...

    def request(self) -> dict[str, Any]:
        """Everything that decides the scores."""
        ...

    def score(self, samples: Sequence[Row]) -> Iterator[tuple[Row, Score]]: ...
