"""The token ids of one example, and how it is shortened by its ids alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from halos.data.row import EQUAL
from halos.errors import UserError
from halos.examples import Completion

TOO_LONG, PROMPT_TOO_LONG = "longer than max_length", "with a prompt that fills max_length"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example, and how they were shortened."""

    prompt: np.ndarray  # (tokens,) int32
    completions: tuple[Completion, ...]
    exact: bool
    merged: bool
    cut_turns: bool = False
    cut_completions: int = 0
    cut_steps: int = 0
    logps: np.ndarray | None = None  # (scored tokens,) of a Scored that has its sampler's
    notes: tuple[str, ...] = ()  # what else is to be counted of it, as its layout says
    tokenised_anew: bool = False  # sampled completions whose token ids were missing or another tokenizer's
    by_ids: bool = True  # whether it is shortened by its ids alone: it has no earlier turns that may go
    step_labels: np.ndarray | None = None  # (scored tokens,) of a Stepwise
    teacher_logps: np.ndarray | None = None  # (scored tokens, 1 + 2 k) of a Demonstration that has what a teacher says

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(each.ids) for each in self.completions)


def refuse_length(encoded: Encoded, max_length: int, where: str) -> None:
    """Raises UserError, naming the row."""
    raise UserError(
        f"{where}: {encoded.length} tokens, and train.max_length is {max_length}; raise it, or choose train.truncation=drop or"
        " train.truncation=truncate"
    )


def why_dropped(encoded: Encoded, max_length: int) -> str:
    """Return why an example is dropped that is too long."""
    return TOO_LONG if len(encoded.prompt) < max_length else PROMPT_TOO_LONG


def cut_completions(encoded: Encoded, max_length: int) -> Encoded | str:
    """Truncate completions, without an end token: the model is not taught to stop in mid-sentence. A string is the reason why
    nothing is left to learn."""
    max_tokens = max_length - len(encoded.prompt)
    if max_tokens <= 0:
        return PROMPT_TOO_LONG
    cut = sum(len(each.ids) > max_tokens for each in encoded.completions)
    completions = tuple(Completion(each.ids[:max_tokens], each.scored[:max_tokens]) for each in encoded.completions)
    if not all(each.scored.any() for each in completions):
        return TOO_LONG
    logps = None if encoded.logps is None else encoded.logps[:max_tokens]
    kept = int(completions[0].scored.sum())
    teacher_logps = None if encoded.teacher_logps is None else encoded.teacher_logps[:kept]
    if (labels := encoded.step_labels) is None:
        return replace(encoded, completions=completions, cut_completions=cut, logps=logps, teacher_logps=teacher_logps)
    return replace(encoded, completions=completions, cut_completions=cut, cut_steps=len(labels) - kept, step_labels=labels[:kept])


def unless_equal(encoded: Encoded | str) -> Encoded | str:
    """Return an example, or why it is dropped: completions that are equal teach nothing."""
    if isinstance(encoded, str):
        return encoded
    first, *others = encoded.completions
    return EQUAL if any(np.array_equal(first.ids, other.ids) for other in others) else encoded
