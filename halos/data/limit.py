"""train.max_length: tokenised examples that are longer are dropped, shortened or refused as they are read, and counted so."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from halos.data.dataset import Dataset
from halos.data.encoded import Encoded, cut_completions, refuse_length, unless_equal, why_dropped
from halos.data.oddities import EndTokens
from halos.data.remarks import Remarks
from halos.examples import Item

NONE = 2**31  # no limit, while rows are tokenised


class Limit:
    """The length of an example, and what becomes of a longer one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: str) -> None:
        self._tokenizer, self._most, self._truncation = tokenizer, max_length, truncation

    @cached_property
    def _ends(self) -> EndTokens:
        return EndTokens.of(self._tokenizer, self._most)

    def to_render_again(self, data: Dataset, by_ids: np.ndarray) -> np.ndarray:
        """Return which examples are to lose turns, for which their text is needed: indices. `by_ids` (N,): which never are."""
        if self._truncation != "truncate":
            return np.zeros(0, np.int64)
        return np.flatnonzero((data.lengths.max(1) > self._most) & ~by_ids)

    def leaves(self, lengths: np.ndarray) -> np.ndarray:
        """Return which examples `fitted` leaves as they are, by their tokens: `lengths` (N, completions), bool (N,)."""
        return lengths.max(1) < self._most

    def fitted(self, item: Item, remarks: Remarks) -> tuple[Item, Remarks] | str:
        """Return an example as it is kept, or why it is dropped. Raises UserError, naming the row, where it is refused."""
        encoded = Encoded(
            item.prompt, item.completions, remarks.exact, remarks.merged, logps=item.logps, step_labels=item.step_labels,
            teacher_logps=item.teacher_logps,
        )  # fmt: skip
        if encoded.length < self._most:
            return item, remarks
        if encoded.length > self._most and self._truncation == "error":
            refuse_length(encoded, self._most, item.id.rpartition("#")[0])
        if encoded.length > self._most and self._truncation == "drop":
            return why_dropped(encoded, self._most)
        shorter = unless_equal(cut_completions(encoded, self._most)) if encoded.length > self._most else encoded
        if isinstance(shorter, str):
            return shorter
        oddity = self._ends.missing(shorter, remarks.sampling)
        parts = {name: getattr(shorter, name) for name in ("completions", "logps", "step_labels", "teacher_logps")}
        cut = {"cut_completions": shorter.cut_completions, "cut_steps": shorter.cut_steps}
        return replace(item, **parts), replace(remarks, oddity=oddity, **cut)
