"""Lengths of sequences as histograms, and what became of the rows of each source: facts that a data set knows."""

from collections.abc import Iterable, Sequence

import numpy as np

from halos.data.dataset import CUT_COMPLETIONS, CUT_TURNS, Counts, Dataset
from halos.inspection.facts import Lengths, Reason, SourceFacts

BINS = 40
WHOLE = "prompt and completion"  # the part of a sequence that train.max_length bounds


def histograms(split: str, data: Dataset, names: Sequence[str]) -> list[Lengths]:
    """The lengths of prompts, of each completion by its name, and of prompt and completion together."""
    prompts = data.prompt_lengths
    parts = [("prompt", prompts), *zip(names, (data.lengths - prompts[:, None]).T, strict=True),
             (WHOLE, data.lengths.ravel())]  # fmt: skip
    return [histogram(split, name, values) for name, values in parts]


def histogram(split: str, part: str, values: np.ndarray) -> Lengths:
    """Count lengths in bins of equal whole widths."""
    most = int(values.max())
    width = max(1, -(-(most + 1) // BINS))
    edges = np.arange(0, most + 1 + width, width)
    counts, _ = np.histogram(values, edges)
    return Lengths(split, part, counts, edges, float(values.mean()), float(np.median(values)), most,
                   float(np.percentile(values, 99)))  # fmt: skip


def sources(split: str, report: Iterable[Counts]) -> list[SourceFacts]:
    """What became of the rows of each source."""
    return [
        SourceFacts(split, counts.name, counts.rows, counts.examples, counts.kept, _reasons(counts, counts.dropped),
                    _reasons(counts, {**_changes(counts), **counts.oddities}))
        for counts in report
    ]  # fmt: skip


def _changes(counts: Counts) -> dict[str, int]:
    return {
        CUT_TURNS: counts.cut_turns,
        CUT_COMPLETIONS: counts.cut_completions,
        "begin otherwise than the template's generation prompt": counts.inexact,
        "were tokenised apart from their prompt": counts.merged,
        "had no token ids of this tokenizer": counts.tokenised_anew,
    }


def _reasons(counts: Counts, totals: dict[str, int]) -> tuple[Reason, ...]:
    return tuple(Reason(text, count, tuple(counts.places.get(text, ()))) for text, count in totals.items() if count)
