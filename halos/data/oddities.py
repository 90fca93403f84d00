"""Signs of a mistake in a row that its token ids no longer show: they are counted while the rows are tokenised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from halos.data.dataset import Counts
from halos.data.encoded import Encoded
from halos.data.messages import REASONING
from halos.examples import Completion, Example, Scored, Turns

ENDS_WITH_ASSISTANT = "whose prompt ends with a turn of the assistant"
UNANSWERED = "whose last turns, which the assistant does not answer, are left out"
NO_WORDS = "whose prompt has no words"
BLANKS_APART = "whose completions differ in blanks alone"
NO_END = "whose last scored turn ends in no scored end token"
NO_EARLIER_END = "with an earlier scored turn that ends in no scored end token"
SAMPLED_WITHOUT_END = "sampled without an end token, and not marked as cut (finish=length)"
MASKED = "masked"
SPLIT_COLUMNS = ("split", "subset")
FIRST_LETTERS = 40  # of a turn, by which it is told from another before all of its words are read
MOST_SPLITS = 20  # values; a column with more names no splits
MOST_TEMPERATURES = 20  # that are counted each by itself
HELD_OUT = re.compile(r"(test|eval|valid|val|dev|held)", re.IGNORECASE)  # how names of splits begin that are not to be trained on


def of_example(example: Example) -> list[str]:
    """Return what is odd about the text of an example."""
    found, prompt, (first, *others) = [], example.prompt, example.completions
    if prompt and prompt[-1]["role"] == "assistant":
        found.append(ENDS_WITH_ASSISTANT)
    if prompt and not any(turn.get("tool_calls") or str(turn.get("content") or "").strip() for turn in prompt):
        found.append(NO_WORDS)
    if any(_differ_in_blanks_at_most(first, turns) for turns in others) and not all(turns == first for turns in others):
        found.append(BLANKS_APART)
    if isinstance(example, Scored) and example.masked:
        found.append(MASKED)
    return found


def _differ_in_blanks_at_most(first: Turns, other: Turns) -> bool:
    if len(first) != len(other):
        return False
    for one, another in zip(first, other, strict=True):  # how they begin tells most apart
        begin, begins = ("".join(str(turn.get("content") or "")[:FIRST_LETTERS].split()) for turn in (one, another))
        if not begin.startswith(begins) and not begins.startswith(begin):
            return False
    return _without_blanks(first) == _without_blanks(other)


def _without_blanks(turns: Turns) -> list[tuple[Any, ...]]:
    return [(turn["role"], *("".join(str(turn.get(name) or "").split()) for name in ("content", REASONING)),
             repr(turn.get("tool_calls") or "")) for turn in turns]  # fmt: skip


class Sampling(NamedTuple):
    """How the completions of an example were sampled."""

    cut: tuple[bool, ...]  # of each whether its sampler has cut it; empty where they are not known to be sampled
    has_ids: bool

    @classmethod
    def of(cls, example: Example) -> Sampling:
        sampled = example.sampled
        return NOT_SAMPLED if not sampled else cls(tuple(each.cut for each in sampled), any(each.ids for each in sampled))


NOT_SAMPLED = Sampling((), has_ids=False)


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The tokens that may end a turn, and the length beyond which an example is cut."""

    ids: frozenset[int]
    max_length: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EndTokens:
        eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]  # the template may end turns without one
        return cls(frozenset([*tokenizer.added_tokens_decoder, *eos]), max_length)

    def missing(self, encoded: Encoded, sampling: Sampling) -> str | None:
        """Return what is odd about an example of which a scored turn ends in none of the tokens, and was not cut."""
        for number, completion in enumerate(encoded.completions if encoded.step_labels is None else ()):
            tokens = completion.ids[_ends_of_turns(completion)].tolist()
            if not tokens:
                continue
            if tokens[-1] not in self.ids:
                is_cut = len(encoded.prompt) + len(completion.ids) >= self.max_length
                is_cut |= bool(sampling.cut) and sampling.cut[number]
                if not is_cut:
                    return SAMPLED_WITHOUT_END if sampling.has_ids else NO_END
            if not self.ids.issuperset(tokens[:-1]):
                return NO_EARLIER_END
        return None


def _ends_of_turns(completion: Completion) -> np.ndarray | slice:
    """Return the last index of every run of scored tokens."""
    if len(completion.scored) and completion.scored.all():
        return slice(-1, None)
    ends = completion.scored.copy()
    ends[:-1] &= ~completion.scored[1:]
    return np.flatnonzero(ends)


def count_temperature(temperature: float, where: str, counts: Counts) -> None:
    """Count an example that is kept with its sampler's log-probs, by the temperature that they are of."""
    name = f"{temperature:g}"
    if name in counts.temperatures or len(counts.temperatures) < MOST_TEMPERATURES:
        counts.temperatures[name] = counts.temperatures.get(name, 0) + 1
        counts.remember(sampled_at(name), where)


def sampled_at(temperature: str) -> str:
    """The name under which the first places of examples with a temperature are remembered."""
    return f"sampled at temperature {temperature}"


def count_split(record: Mapping[str, Any], counts: Counts) -> None:
    """Count the values of a column that names each row's split."""
    for column in SPLIT_COLUMNS:
        value = record.get(column)
        if isinstance(value, str) and len(value) < 40:
            name = f"{column}={value}"
            if name in counts.splits or len(counts.splits) <= MOST_SPLITS:
                counts.splits[name] = counts.splits.get(name, 0) + 1


def mixed_splits(counts: Counts) -> dict[str, int]:
    """Return the rows by split of a source whose rows are of several, one of which by its name is not to be trained on."""
    for column in SPLIT_COLUMNS:
        values = {name.partition("=")[2]: count for name, count in counts.splits.items() if name.startswith(f"{column}=")}
        if 1 < len(values) < MOST_SPLITS and any(map(HELD_OUT.match, values)):
            return {f"{column}={name}": count for name, count in values.items()}
    return {}
