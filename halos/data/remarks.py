"""Remarks on an example that is kept, to be counted: they lie beside its token ids, so that each run counts its own rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halos.data.dataset import CUT_COMPLETIONS, CUT_TURNS, Counts
from halos.data.encoded import Encoded
from halos.data.oddities import Sampling, count_temperature


@dataclass(frozen=True, slots=True)
class Remarks:
    """Equal for most examples of a source."""

    exact: bool
    merged: bool
    tokenised_anew: bool
    by_ids: bool  # whether it is shortened by its ids alone
    notes: tuple[str, ...]
    oddity: str | None
    sampling: Sampling
    cut_turns: bool = False
    cut_completions: int = 0
    cut_steps: int = 0
    temperature: float | None = None  # of its sampler's log-probs, where it has them

    @classmethod
    def of(cls, encoded: Encoded, oddity: str | None, sampling: Sampling, temperature: float | None = None) -> Remarks:
        return cls(encoded.exact, encoded.merged, encoded.tokenised_anew, encoded.by_ids, encoded.notes, oddity, sampling,
                   encoded.cut_turns, encoded.cut_completions, encoded.cut_steps,
                   None if encoded.logps is None else temperature)  # fmt: skip

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Remarks:
        """From JSON."""
        cut, has_ids = values["sampling"]
        others: dict[str, Any] = {**values, "notes": tuple(values["notes"]), "sampling": Sampling(tuple(cut), has_ids)}
        return cls(**others)

    @property
    def is_plain(self) -> bool:
        """Whether no row is named for them."""
        return not (self.notes or self.oddity or self.cut_turns or self.cut_completions or self.temperature is not None)

    def count_plain(self, examples: int, counts: Counts) -> None:
        """Count examples that are kept, whose remarks are plain."""
        counts.kept += examples
        counts.inexact += examples * (not self.exact)
        counts.merged += examples * self.merged
        counts.tokenised_anew += examples * self.tokenised_anew
        counts.cut_steps += examples * self.cut_steps

    def count(self, where: str, counts: Counts) -> None:
        """Count an example that is kept, of the row at `where`."""
        self.count_plain(1, counts)
        for shortened, what in ((self.cut_turns, CUT_TURNS), (self.cut_completions, CUT_COMPLETIONS)):
            if shortened:
                counts.remember(what, where)
        counts.cut_turns += self.cut_turns
        counts.cut_completions += self.cut_completions
        counts.read_as(self.notes)
        for note in self.notes:
            counts.remember(note, where)
        if self.oddity:
            counts.note(self.oddity, where)
        if self.temperature is not None:
            count_temperature(self.temperature, where, counts)
