"""The facts of a dry run, which its page shows: what is trained on, checked and needed. Plain values, without a model."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from halos.inspection.findings import Check

TokenKind = Literal["prompt", "scored", "unscored"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token as a reader sees it."""

    id: int
    text: str  # what it adds to the text before it
    special: bool
    partial: bool = False  # of a character that several tokens make up: `text` is the tokenizer's own name for it


@dataclass(frozen=True, slots=True)
class Part:
    """A prompt, or a completion by its name; tokens beyond the middle of a long one are left out."""

    name: str
    tokens: tuple[tuple[Token, TokenKind], ...]
    length: int  # tokens, with those left out
    scored: int  # of them
    gap_at: int | None = None  # index in `tokens` before which some are left out


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One row as the model gets it."""

    split: str
    place: str
    why: str  # it was chosen
    parts: tuple[Part, ...]
    labels: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Reason:
    """Why examples were dropped or changed, how many, and the first of them."""

    text: str
    count: int
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What became of the rows of one entry of data.train or data.eval."""

    split: str
    name: str
    rows: int
    examples: int
    kept: int
    dropped: tuple[Reason, ...] = ()
    changed: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths in tokens of all prompts, completions or whole sequences of a split."""

    split: str
    part: str
    counts: np.ndarray  # (bins,) sequences
    edges: np.ndarray  # (bins + 1,) tokens
    mean: float
    median: float
    most: int
    at_percentile_99: float


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of a table: what it is, its value as text, and what to know about it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the page of a dry run shows."""

    title: str
    overrides: tuple[str, ...]
    run: str  # its directory
    header: tuple[tuple[str, str], ...]  # the level and the text of each line
    covers: str  # what of the run was checked
    checks: tuple[Check, ...] = ()
    sources: tuple[SourceFacts, ...] = ()
    lengths: tuple[Lengths, ...] = ()
    max_length: int | None = None
    rows: tuple[ShownRow, ...] = ()
    work: tuple[Fact, ...] = ()  # steps and tokens, time, disk
    memory: tuple[Fact, ...] = ()
    versions: tuple[Fact, ...] = field(default=())
