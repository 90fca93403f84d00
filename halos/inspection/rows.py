"""Choose rows to look at, and render each token of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from halos.data.dataset import Dataset
from halos.examples import Completion
from halos.inspection.facts import Part, ShownRow, Token, TokenKind

LONGEST = 1500  # tokens shown of a prompt or a completion
ANCHOR = "a"  # decoded before a token, since tokenizers leave out the blank before a first word


def choose(splits: Sequence[tuple[str, Dataset]], count: int) -> list[tuple[str, Dataset, int, str]]:
    """Choose rows of every source, the shortest, the longest and some between: (split, data, row, why)."""
    sources = [(name, data, rows) for name, data in splits for rows in _by_source(data)]
    each = max(2, count // max(1, len(sources)))
    chosen = [(name, data, row, why) for name, data, rows in sources for row, why in _spread(data.lengths.max(1), rows, each)]
    return chosen[: max(count, 2 * len(sources))]


def _by_source(data: Dataset) -> Iterable[np.ndarray]:
    for number in range(len(data.weights)):
        if len(rows := np.flatnonzero(data.sources == number)):
            yield rows


def _spread(lengths: np.ndarray, rows: np.ndarray, count: int) -> Iterable[tuple[int, str]]:
    """The shortest row, the longest, the first, and rows at even steps of the lengths between: each once, with why."""
    ordered = rows[np.argsort(lengths[rows], kind="stable")]
    chosen = {int(ordered[0]): "the shortest"}
    for row, why in ((ordered[-1], "the longest"), (rows[0], "the first")):
        chosen.setdefault(int(row), why)
    free = np.flatnonzero(~np.isin(ordered, list(chosen)))
    at = free[np.linspace(0, len(free) - 1, min(len(free), max(0, count - len(chosen)))).round().astype(int)]
    chosen |= {int(ordered[each]): f"longer than {100 * each // len(ordered)}%" for each in at}
    return list(chosen.items())[:count]


class Renderer:
    """Renders tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._special = tokenizer, frozenset(tokenizer.added_tokens_decoder) | {*tokenizer.all_special_ids}
        self._anchor = [int(each) for each in tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]]
        self.token = cache(self._token)

    def row(self, split: str, data: Dataset, number: int, why: str, names: Sequence[str]) -> ShownRow:
        """Render row `number`; `names` are those of its completions."""
        item = data[number]
        completions = [self._part(name, each) for name, each in zip(names, item.completions, strict=True)]
        return ShownRow(split, data.place(number), why, (self.prompt(item.prompt), *completions), tuple(item.labels.items()))

    def prompt(self, ids: np.ndarray) -> Part:
        kinds: list[TokenKind] = ["prompt"] * len(ids)
        return self._shown("prompt", ids, kinds, 0)

    def _part(self, name: str, completion: Completion) -> Part:
        kinds: list[TokenKind] = ["scored" if scored else "unscored" for scored in completion.scored.tolist()]
        return self._shown(name, completion.ids, kinds, int(completion.scored.sum()))

    def _shown(self, name: str, ids: np.ndarray, kinds: Sequence[TokenKind], scored: int) -> Part:
        tokens = list(zip(ids.tolist(), kinds, strict=True))
        shown = tokens if len(tokens) <= LONGEST else [*tokens[: LONGEST // 2], *tokens[-LONGEST // 2 :]]
        gap = LONGEST // 2 if len(shown) < len(tokens) else None
        return Part(name, tuple((self.token(number), kind) for number, kind in shown), len(tokens), scored, gap)

    def _token(self, number: int) -> Token:
        text = self._decoded([*self._anchor, number]).removeprefix(self._decoded(self._anchor))
        if "\ufffd" in text:
            return Token(number, str(self._tokenizer.convert_ids_to_tokens(number)), number in self._special, partial=True)
        return Token(number, text, number in self._special)

    def _decoded(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
