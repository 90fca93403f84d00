"""From examples to token ids, in batches, within max_length."""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from halos.data.messages import is_learned
from halos.data.template import Layout, Span, Template, any_of
from halos.errors import UserError
from halos.examples import Completion, Demonstration, Example, Scored, Turns

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
    logps: np.ndarray | None = None  # (scored tokens,) of a Scored whose sampler kept them
    tokenised_anew: bool = False  # a Scored of which only the text could be used

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(each.ids) for each in self.completions)


class _Tokens(NamedTuple):
    ids: list[int]
    starts: list[int]  # the character at which each begins; empty where nobody asked

    def scored(self, spans: Sequence[Span], shift: int) -> np.ndarray:
        """Which tokens begin inside a span, counted from the character `shift`; the only span of a completion is all of it."""
        if len(spans) == 1:
            return np.ones(len(self.ids), bool)
        starts = np.array(self.starts) - shift
        return np.any([(start <= starts) & (starts < end) for start, end in spans], axis=0)


class Encoder:
    """Tokenises examples. The prompt's ids are those of the prompt alone, as a sampler would feed it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, truncation: str) -> None:
        self._tokenizer, self._template = tokenizer, Template(tokenizer)
        self._max_length, self._truncation, self._vocabulary = max_length, truncation, vocabulary_of(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self._seams = any_of(str(t) for t in added if not (t.normalized or t.lstrip or t.rstrip or t.single_word))

    def encode(self, examples: Sequence[tuple[Example, str]]) -> list[Encoded | str]:
        """Each example comes with its place in the data; a string in the answer says why one is dropped."""
        whole = [self._is_sampled(example) for example, _ in examples]
        told = [given for given, sampled in zip(examples, whole, strict=True) if not sampled]
        laid_out = [self._template.lay_out(example.prompt, example.completions, where) for example, where in told]
        encoded = iter(self._encode(laid_out) if laid_out else [])
        kept = iter(self._keep([given for given, sampled in zip(examples, whole, strict=True) if sampled]))
        fitted = [self._fit(next(kept if sampled else encoded), *given) for sampled, given in zip(whole, examples, strict=True)]
        return [EQUAL if isinstance(each, Encoded) and _has_equal_completions(each) else each for each in fitted]

    def prompts(self, prompts: Sequence[tuple[Turns, str]]) -> list[np.ndarray]:
        """The ids that a sampler is fed, the template's generation prompt included: (tokens,) int32 each."""
        texts = [self._template.generation_prompt(turns, where) for turns, where in prompts]
        return [np.array(found.ids, np.int32) for found in self._tokenise(texts)] if texts else []

    def _is_sampled(self, example: Example) -> bool:
        """Whether an example brings its own tokens, and they are this tokenizer's."""
        return isinstance(example, Scored) and bool(example.ids) and example.vocabulary == self._vocabulary

    def _keep(self, examples: Sequence[tuple[Example, str]]) -> list[Encoded]:
        """What was sampled, token by token as it was sampled: all of it is scored, an end token where there is one."""
        found = []
        prompts = self.prompts([(example.prompt, where) for example, where in examples])
        for prompt, (example, _) in zip(prompts, examples, strict=True):
            assert isinstance(example, Scored)
            ids = np.array(example.ids, np.int32)
            logps = np.array(example.logps, np.float32) if example.logps else None
            found.append(Encoded(prompt, (Completion(ids, np.ones(len(ids), bool)),), exact=True, merged=False, logps=logps))
        return found

    def _encode(self, layouts: Sequence[Layout]) -> list[Encoded]:
        prompts = list(dict.fromkeys(layout.prompt for layout in layouts))
        prompt_ids = {prompt: found.ids for prompt, found in zip(prompts, self._tokenise(prompts), strict=True)}
        seams = {prompt: self._seam(prompt) for prompt in prompts}
        tails = [layout.prompt[seams[layout.prompt] :] + text for layout in layouts for text in layout.completions]
        starts = any(len(spans) > 1 for layout in layouts for spans in layout.spans)
        found = iter(self._tokenise(tails, starts=starts))
        return [
            self._join(layout, prompt_ids[layout.prompt], seams[layout.prompt], [next(found) for _ in layout.completions])
            for layout in layouts
        ]

    def _seam(self, prompt: str) -> int:
        """Where the prompt's last added token starts. Nothing merges across one, so what stands before is tokenised once."""
        return max((match.start() for match in self._seams.finditer(prompt)), default=0)

    def _tokenise(self, texts: list[str], *, starts: bool = False) -> list[_Tokens]:
        # Rendered text has its special tokens already, BOS included.
        found = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=starts)
        places = found["offset_mapping"] if starts else [()] * len(texts)
        return [_Tokens(ids, [start for start, _ in place]) for ids, place in zip(found["input_ids"], places, strict=True)]

    def _join(self, layout: Layout, prompt: list[int], seam: int, tails: list[_Tokens]) -> Encoded:
        """Each completion's ids: what follows the prompt's in the whole, or its own where the two share a token."""
        repeated = prompt[len(prompt) - 1 - prompt[::-1].index(tails[0].ids[0]) :] if seam else prompt
        completions, merged = [], False
        for text, spans, tail in zip(layout.completions, layout.spans, tails, strict=True):
            shift = len(layout.prompt) - seam
            if tail.ids[: len(repeated)] == repeated:
                tail = _Tokens(tail.ids[len(repeated) :], tail.starts[len(repeated) :])
            else:
                (tail,), shift, merged = self._tokenise([text], starts=True), 0, True
            scored = tail.scored(spans, shift)
            if not prompt:
                scored[0] = False  # there is nothing to predict it from
            completions.append(Completion(np.array(tail.ids, np.int32), scored))
        return Encoded(np.array(prompt, np.int32), tuple(completions), layout.exact, merged)

    # --- max_length ----------------------------------------------------------------------------------------------------

    def _fit(self, encoded: Encoded, example: Example, where: str) -> Encoded | str:
        if isinstance(example, Scored) and not self._is_sampled(example):
            encoded = replace(encoded, tokenised_anew=True)
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
        shorter = _shortened(example)
        tried: dict[int, Encoded] = {}

        def fits(n: int) -> bool:
            tried[n] = self._encode([self._template.lay_out(shorter[n].prompt, shorter[n].completions, where)])[0]
            return tried[n].length <= self._max_length

        if not shorter or self._is_sampled(example):  # what was sampled from a prompt says nothing about another
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
        logps = None if encoded.logps is None else encoded.logps[:room]
        return replace(encoded, completions=completions, cut_completions=cut, logps=logps)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special token that ends an assistant's turn as training scores it; none where the template takes no plain turn."""
    turns = Demonstration(({"role": "user", "content": "x"},), ({"role": "assistant", "content": "y"},))
    try:
        (encoded,) = Encoder(tokenizer, max_length=2**31, truncation="drop").encode([(turns, "a plain turn")])
    except UserError:
        return ()
    last = int(encoded.completions[0].ids[-1]) if isinstance(encoded, Encoded) else None
    return (last,) if last is not None and (last in tokenizer.added_tokens_decoder or last == tokenizer.eos_token_id) else ()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for what its token ids mean."""
    words = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.blake2b(repr(words).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _has_equal_completions(encoded: Encoded) -> bool:
    first, *others = encoded.completions
    return any(np.array_equal(first.ids, other.ids) for other in others)


def _shortened(example: Example) -> list[Example]:
    """The example without its oldest turns, shorter and shorter: system turns stay, and the first other one is the user's.

    The last of them keeps the last user turn and what follows it. In a conversation of which all assistant turns are
    scored, the oldest of those go too.
    """
    (first, *others), turns = example.completions, example.prompt
    turns += () if others else first
    others = [n for n, turn in enumerate(turns) if turn["role"] not in _SYSTEM]
    return [_starting_at(example, n) for n in others[1:] if turns[n]["role"] == "user"]


def _starting_at(example: Example, start: int) -> Example:
    prompt = example.prompt
    if start < len(prompt):
        return replace(example, prompt=_system_turns(prompt[:start]) + prompt[start:])
    ((name, completion),) = zip(example.completed, example.completions, strict=True)
    turns = prompt + completion
    answer = next(n for n in range(start, len(turns)) if is_learned(turns[n]))
    return replace(example, prompt=_system_turns(turns[:start]) + turns[start:answer], **{name: turns[answer:]})


def _system_turns(turns: Turns) -> Turns:
    return tuple(turn for turn in turns if turn["role"] in _SYSTEM)
