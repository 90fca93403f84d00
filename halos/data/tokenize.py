"""From examples to token ids, in batches, within max_length."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from halos.data.dataset import Completion
from halos.data.template import Layout, Span, Template, any_of
from halos.errors import UserError
from halos.types import Comparison, Example, Turns

TOO_LONG, PROMPT_TOO_LONG = "longer than max_length", "with a prompt that fills max_length"
EQUAL = "with equal completions"
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example, and what was done to make them fit."""

    prompt: np.ndarray  # (tokens,) int32
    completions: tuple[Completion, ...]
    exact: bool
    merged: bool
    cut_turns: bool = False
    cut_completions: int = 0

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(each.ids) for each in self.completions)


class Encoder:
    """Tokenises examples. The prompt's ids are those of the prompt alone, as a sampler would feed it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, truncation: str) -> None:
        self._tokenizer, self._template = tokenizer, Template(tokenizer)
        self._max_length, self._truncation = max_length, truncation
        added = tokenizer.added_tokens_decoder.values()
        self._seams = any_of(str(t) for t in added if t.special and not (t.normalized or t.lstrip or t.rstrip or t.single_word))

    def encode(self, examples: Sequence[tuple[Example, str]]) -> list[Encoded | str]:
        """Each example comes with its place in the data; a string in the answer says why one is dropped."""
        layouts = [self._template.lay_out(*_parts(example), where) for example, where in examples]
        fitted = [self._fit(each, *given) for each, given in zip(self._encode(layouts), examples, strict=True)]
        return [EQUAL if isinstance(each, Encoded) and _equal(each) else each for each in fitted]

    def _encode(self, layouts: Sequence[Layout]) -> list[Encoded]:
        prompts = dict.fromkeys(layout.prompt for layout in layouts)
        seams = {prompt: self._seam(prompt) for prompt in prompts}
        tails = [layout.prompt[seams[layout.prompt] :] + text for layout in layouts for text in layout.completions]
        ids = iter(self._ids([*prompts, *tails]))
        prompt_ids = {prompt: next(ids) for prompt in prompts}
        encoded = []
        for layout in layouts:
            prompt, wholes = prompt_ids[layout.prompt], [next(ids) for _ in layout.completions]
            if seams[layout.prompt]:
                before = len(prompt) - 1 - prompt[::-1].index(wholes[0][0])
                wholes = [prompt[:before] + tail for tail in wholes]
            encoded.append(self._split(layout, prompt, wholes))
        return encoded

    def _seam(self, prompt: str) -> int:
        """Where the prompt's last special token starts. Nothing merges across one, so what stands before is tokenised once."""
        return max((match.start() for match in self._seams.finditer(prompt)), default=0)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # Rendered text has its special tokens already, BOS included.
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _split(self, layout: Layout, prompt: list[int], wholes: list[list[int]]) -> Encoded:
        completions, merged = [], False
        for text, spans, whole in zip(layout.completions, layout.spans, wholes, strict=True):
            apart = whole[: len(prompt)] != prompt
            merged |= apart
            ids = np.array(self._ids([text])[0] if apart else whole[len(prompt) :], np.int32)
            scored = np.ones(len(ids), bool)
            if spans != ((0, len(text)),):
                scored = self._scored(text if apart else layout.prompt + text, spans, 0 if apart else len(layout.prompt))
                scored = scored[-len(ids) :]
            completions.append(Completion(ids, scored))
        return Encoded(np.array(prompt, np.int32), tuple(completions), layout.exact, merged)

    def _scored(self, text: str, spans: Sequence[Span], shift: int) -> np.ndarray:
        """Which tokens of `text` begin inside a span of it, counted from the character `shift`."""
        found = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True)
        starts = np.array([start for start, _ in found["offset_mapping"]]) - shift
        return np.any([(start <= starts) & (starts < end) for start, end in spans], axis=0)

    # --- max_length ----------------------------------------------------------------------------------------------------

    def _fit(self, encoded: Encoded, example: Example, where: str) -> Encoded | str:
        if encoded.length <= self._max_length:
            return encoded
        if self._truncation == "error":
            raise UserError(
                f"{where}: {encoded.length} tokens, and train.max_length is {self._max_length}; raise it, or choose "
                "train.truncation=drop or train.truncation=truncate"
            )
        if self._truncation == "drop":
            return TOO_LONG if len(encoded.prompt) < self._max_length else PROMPT_TOO_LONG
        return self._cut_completions(self._cut_turns(encoded, example, where))

    def _cut_turns(self, encoded: Encoded, example: Example, where: str) -> Encoded:
        """Without as many of the oldest turns as it takes; with only the last user turn where that is not enough."""
        shorter = _without_oldest(example)
        tried: dict[int, Encoded] = {}

        def fits(n: int) -> bool:
            tried[n] = self._encode([self._template.lay_out(*_parts(shorter[n]), where)])[0]
            return tried[n].length <= self._max_length

        if not shorter:
            return encoded
        first = bisect_left(range(len(shorter)), True, key=fits)  # lengths fall, so the search has tried where it ends
        return replace(tried[min(first, len(shorter) - 1)], cut_turns=True)

    def _cut_completions(self, encoded: Encoded) -> Encoded | str:
        """Completions cut at the end, which leaves no end token: the model is not taught to stop in mid-sentence."""
        room = self._max_length - len(encoded.prompt)
        if room <= 0:
            return PROMPT_TOO_LONG
        cut = sum(len(each.ids) > room for each in encoded.completions)
        completions = tuple(Completion(each.ids[:room], each.scored[:room]) for each in encoded.completions)
        if not all(each.scored.any() for each in completions):
            return TOO_LONG
        return replace(encoded, completions=completions, cut_completions=cut)


def _parts(example: Example) -> tuple[Turns, tuple[Turns, ...]]:
    if isinstance(example, Comparison):
        return example.prompt, (example.chosen, example.rejected)
    return example.prompt, (example.completion,)


def _equal(encoded: Encoded) -> bool:
    return len(encoded.completions) == 2 and np.array_equal(*(each.ids for each in encoded.completions))


def _without_oldest(example: Example) -> list[Example]:
    """The example without its oldest turns, shorter and shorter: system turns stay, and the first other one is the user's.

    The last of them keeps the last user turn and what follows it. In a conversation of which all assistant turns are
    scored, the oldest of those go too.
    """
    prompt, completions = _parts(example)
    turns = prompt if isinstance(example, Comparison) else prompt + completions[0]
    others = [n for n, turn in enumerate(turns) if turn["role"] not in _SYSTEM]
    return [_from(example, n) for n in others[1:] if turns[n]["role"] == "user"]


def _from(example: Example, start: int) -> Example:
    prompt = example.prompt
    if start < len(prompt):
        return replace(example, prompt=_system(prompt[:start]) + prompt[start:])
    assert not isinstance(example, Comparison)
    turns = prompt + example.completion
    answer = next(n for n in range(start, len(turns)) if turns[n]["role"] == "assistant")
    return replace(example, prompt=_system(turns[:start]) + turns[start:answer], completion=turns[answer:])


def _system(turns: Turns) -> Turns:
    return tuple(turn for turn in turns if turn["role"] in _SYSTEM)
