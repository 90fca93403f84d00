"""Tokenise examples in batches, within max_length."""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from halos.data import raw_text, shorten, steps, teacher
from halos.data.encoded import Encoded, cut_completions, refuse_length, unless_equal, why_dropped
from halos.data.endings import CALL
from halos.data.fast_tokenizer import FastTokenizer
from halos.data.messages import is_learned
from halos.data.template import Layout, LostError, Span, Template, TogetherError, any_of
from halos.errors import UserError
from halos.examples import Completion, Demonstration, Example, Scored, Stepwise, Turns

WITHIN_TOKEN = "with a later scored turn that begins within a token, which is not scored"
APART = "are single turns of conversations, whose scored turns the chat template cannot render together"


class _Tokens(NamedTuple):
    ids: list[int]
    bounds: Sequence[Span]  # characters of each; empty where not requested

    def scored(self, spans: Sequence[Span], shift: int) -> np.ndarray:
        """Return a mask of the tokens that begin inside a span. `shift` is the character from which spans count; a single span is
        the whole completion."""
        if len(spans) == 1:
            return np.ones(len(self.ids), bool)
        starts = np.array([start for start, _ in self.bounds]) - shift
        return np.any([(start <= starts) & (starts < end) for start, end in spans], axis=0)


class Encoder:
    """Tokenises examples. A prompt has the ids of the prompt alone, as a sampler gets it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, truncation: str, lost: str = "error",
        temperature: float | None = None,
    ) -> None:  # fmt: skip
        """`temperature` is that of training, where a teacher's log-probs are read."""
        self._tokenizer, self._template = tokenizer, Template(tokenizer, lost=lost)
        self._laid_out: dict[int, Layout | str] = {}  # by the id of an example whose layout was tried already
        self._max_length, self._truncation, self._vocabulary = max_length, truncation, vocabulary_of(tokenizer)
        known = {"vocabulary": self._vocabulary, "num_ids": len(tokenizer), "temperature": temperature}
        self._with_teacher = partial(teacher.with_teacher, **known)
        added = tokenizer.added_tokens_decoder.values()
        self._fast: FastTokenizer | None = None
        self._seams = any_of(str(t) for t in added if not (t.normalized or t.lstrip or t.rstrip or t.single_word))

    def encode(self, examples: Sequence[tuple[Example, str]]) -> list[Encoded | str]:
        """Tokenise examples, each with the position of its row; a string in the result is the reason why one is dropped."""
        if examples and isinstance(examples[0][0], Stepwise):  # all examples of a data set have one type
            fitted = zip(self._encode_steps(examples), examples, strict=True)
            return [self._fit(encoded, *each) for encoded, each in fitted]
        sampled = [self._is_sampled(example) for example, _ in examples]
        texts = [each for each, has_ids in zip(examples, sampled, strict=True) if not has_ids]
        layouts = [self._layout_or_reason(example, where) for example, where in texts]
        whole = [layout for layout in layouts if isinstance(layout, Layout)]
        tokenised = iter(self._encode(whole) if whole else [])
        encoded = iter([layout if isinstance(layout, str) else next(tokenised) for layout in layouts])
        kept = iter(self._keep([each for each, has_ids in zip(examples, sampled, strict=True) if has_ids]))
        encodings = (next(kept if has_ids else encoded) for has_ids in sampled)
        fitted = [self._fit(self._with_teacher(each, *of), *of) for each, of in zip(encodings, examples, strict=True)]
        learned = [_unscored(each) if isinstance(example, Scored) and example.masked and isinstance(each, Encoded) else each
                   for each, (example, _) in zip(fitted, examples, strict=True)]  # fmt: skip
        return [unless_equal(each) for each in learned]

    def encode_turns(self, examples: Sequence[tuple[Example, str]]) -> list[list[Encoded | str]]:
        """Tokenise examples as `encode` does, but a demonstration of several scored turns that the template renders otherwise
        once others follow (as Qwen3 does, without their thoughts) as one for each: the turn as the model is to write it, after
        the others as it will read them."""
        split = [self._by_turn(example, where) for example, where in examples]
        encoded = iter(self.encode([(part, where) for parts, (_, where) in zip(split, examples, strict=True) for part in parts]))
        self._laid_out.clear()
        results = [[next(encoded) for _ in parts] for parts in split]
        return [[replace(each, notes=(*each.notes, APART)) if len(parts) > 1 and isinstance(each, Encoded) else each
                 for each in parts] for parts in results]  # fmt: skip

    def _by_turn(self, example: Example, where: str) -> list[Example]:
        if not isinstance(example, Demonstration) or example.sampled or sum(map(is_learned, example.completion)) < 2:
            return [example]
        try:
            self._laid_out[id(example)] = self._layout_or_reason(example, where)
        except TogetherError:
            turns, start = (*example.prompt, *example.completion), len(example.prompt)
            return [
                replace(example, prompt=turns[:n], completion=(turns[n],))
                for n in range(start, len(turns))
                if is_learned(turns[n])
            ]
        return [example]

    def prompts(self, prompts: Sequence[tuple[Turns, str]]) -> list[np.ndarray]:
        """Return the ids that a sampler gets, the template's generation prompt included: (tokens,) int32 each."""
        texts = [self._template.generation_prompt(turns, where) for turns, where in prompts]
        for text, (_, where) in zip(texts, prompts, strict=True):
            _refuse_half_characters((text,), where)
        return [np.array(tokens.ids, np.int32) for tokens in self._tokenise(texts)] if texts else []

    def _is_sampled(self, example: Example) -> bool:
        """Return whether all completions of an example have token ids, and they are this tokenizer's."""
        return bool(example.sampled) and all(each.ids and each.vocabulary == self._vocabulary for each in example.sampled)

    def _keep(self, examples: Sequence[tuple[Example, str]]) -> list[Encoded]:
        """Keep sampled completions token by token; all their tokens are scored, an end token where there is one."""
        encoded = []
        prompts = self.prompts([(example.prompt, where) for example, where in examples])
        for prompt, (example, _) in zip(prompts, examples, strict=True):
            ids = [np.array(each.ids, np.int32) for each in example.sampled]
            completions = tuple(Completion(each, np.ones(len(each), bool)) for each in ids)
            logps = np.array(example.logps, np.float32) if isinstance(example, Scored) and example.logps else None
            encoded.append(Encoded(prompt, completions, exact=True, merged=False, logps=logps))
        return encoded

    def _layout_or_reason(self, example: Example, where: str) -> Layout | str:
        if (known := self._laid_out.pop(id(example), None)) is not None:
            return known
        try:
            return self._lay_out(example, where)
        except LostError as loss:
            return str(loss)

    def _lay_out(self, example: Example, where: str) -> Layout:
        if raw_text.is_raw(example):
            layout = raw_text.layout(self._tokenizer, example, self._template.notes_on)
        else:
            cut = [each.cut for each in example.sampled]
            layout = self._template.lay_out(example.prompt, example.completions, where, cut=cut)
        _refuse_half_characters((layout.prompt, *layout.completions), where)
        return layout

    def _encode(self, layouts: Sequence[Layout]) -> list[Encoded]:
        prompts = list(dict.fromkeys(layout.prompt for layout in layouts))
        prompt_ids = {prompt: tokens.ids for prompt, tokens in zip(prompts, self._tokenise(prompts), strict=True)}
        seams = {prompt: self._seam(prompt) for prompt in prompts}
        tails = [layout.prompt[seams[layout.prompt] :] + text for layout in layouts for text in layout.completions]
        needs_bounds = any(len(spans) > 1 for layout in layouts for spans in layout.spans)
        tokens = iter(self._tokenise(tails, bounds=needs_bounds))
        return [
            self._join(layout, prompt_ids[layout.prompt], seams[layout.prompt], [next(tokens) for _ in layout.completions])
            for layout in layouts
        ]

    def _encode_steps(self, examples: Sequence[tuple[Example, str]]) -> list[Encoded | str]:
        """Tokenise prompts, steps and separators, each by itself."""
        laid_out = list[steps.StepTexts | str]()
        for example, where in examples:
            assert isinstance(example, Stepwise)
            try:
                texts = steps.lay_out(self._template, example, where)
                _refuse_half_characters(texts.texts, where)
                laid_out.append(texts)
            except LostError as loss:
                laid_out.append(str(loss))
        words = list(dict.fromkeys(text for each in laid_out if not isinstance(each, str) for text in each.texts))
        ids = {text: tokens.ids for text, tokens in zip(words, self._tokenise(words) if words else [], strict=True)}
        return [each if isinstance(each, str) else steps.encode(each, ids, where)
                for each, (_, where) in zip(laid_out, examples, strict=True)]  # fmt: skip

    def _seam(self, prompt: str) -> int:
        """Return where the last added token of the prompt starts: no merge crosses it, so the text before is tokenised once."""
        return max((match.start() for match in self._seams.finditer(prompt)), default=0)

    def _tokenise(self, texts: list[str], *, bounds: bool = False) -> list[_Tokens]:
        # Rendered text contains its special tokens, BOS included.
        if not bounds and (backend := backend_of(self._tokenizer)) is not None:
            self._fast = self._fast or FastTokenizer(backend)
            return [_Tokens(ids, []) for ids in self._fast(texts)]
        encoding = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=bounds)
        offsets = encoding["offset_mapping"] if bounds else [()] * len(texts)
        return [_Tokens(*each) for each in zip(encoding["input_ids"], offsets, strict=True)]

    def _join(self, layout: Layout, prompt: list[int], seam: int, tails: list[_Tokens]) -> Encoded:
        """Split off each completion's ids: the suffix of the joint tokenisation, or the completion tokenised alone where a merge
        crosses the prompt's end."""
        notes = layout.notes
        repeated = prompt[len(prompt) - 1 - prompt[::-1].index(tails[0].ids[0]) :] if seam else prompt
        completions, merged = [], False
        for text, spans, tail in zip(layout.completions, layout.spans, tails, strict=True):
            shift = len(layout.prompt) - seam
            if tail.ids[: len(repeated)] == repeated:
                tail = _Tokens(tail.ids[len(repeated) :], tail.bounds[len(repeated) :])
            else:
                (tail,), shift, merged = self._tokenise([text], bounds=True), 0, True
            if any(first < start + shift < end for start, _ in spans[1:] for first, end in tail.bounds):
                notes = (*layout.notes, WITHIN_TOKEN)
            scored = tail.scored(spans, shift)
            if not prompt:
                scored[0] = False  # it has no context to be predicted from
            completions.append(Completion(np.array(tail.ids, np.int32), scored))
        return Encoded(np.array(prompt, np.int32), tuple(completions), layout.exact, merged, notes=notes)

    # --- max_length ----------------------------------------------------------------------------------------------------

    def _fit(self, encoded: Encoded | str, example: Example, where: str) -> Encoded | str:
        if isinstance(encoded, str):
            return encoded
        had_ids = isinstance(example, Scored) or any(each.ids for each in example.sampled)
        if had_ids and not self._is_sampled(example):
            encoded = replace(encoded, tokenised_anew=True)
        if encoded.length <= self._max_length:
            is_masked = isinstance(example, Scored) and example.masked  # which no scored token shows to be cut too short
            may_lose_turns = bool(shorten.starts(example)) and not self._is_sampled(example)
            return replace(encoded, by_ids=False) if may_lose_turns or is_masked else encoded
        if self._truncation == "error":
            refuse_length(encoded, self._max_length, where)
        if self._truncation == "drop":
            return why_dropped(encoded, self._max_length)
        try:
            return cut_completions(self._cut_turns(encoded, example, where), self._max_length)
        except LostError as loss:
            return str(loss)

    def _cut_turns(self, encoded: Encoded, example: Example, where: str) -> Encoded:
        """Remove as many of the oldest turns as necessary; where that is not enough, all but the last user turn."""
        if encoded.teacher_logps is not None:
            return encoded  # its teacher has read all turns
        shorter = shorten.shortened(example)
        tried: dict[int, Encoded] = {}

        def fits(n: int) -> bool:
            if isinstance(shorter[n], Stepwise):
                (encoded,) = self._encode_steps([(shorter[n], where)])
            else:
                (encoded,) = self._encode([self._lay_out(shorter[n], where)])
            if isinstance(encoded, str):
                raise LostError(encoded)
            tried[n] = encoded
            return tried[n].length <= self._max_length

        if not shorter or self._is_sampled(example):  # a sample belongs to its whole prompt
            return encoded
        first = bisect_left(range(len(shorter)), True, key=fits)  # lengths decrease, and the search has tried its result
        return replace(tried[min(first, len(shorter) - 1)], cut_turns=True)


def _refuse_half_characters(texts: Sequence[str], where: str) -> None:
    """Raises UserError for text that no tokenizer takes; readers of files refuse it, and functions of the user's may make it."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds a lone surrogate, half of a character, such as \\ud800") from error


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end assistant turns in training, those with tool calls included; empty where the template refuses a
    plain turn."""
    plain = Demonstration(({"role": "user", "content": "x"},), ({"role": "assistant", "content": "y"},))
    encoder, stops = Encoder(tokenizer, max_length=2**31, truncation="drop"), dict[int, None]()
    for example in (plain, replace(plain, completion=(CALL,))):
        try:
            (encoded,) = encoder.encode([(example, "a plain turn")])
        except UserError:
            continue
        last = int(encoded.completions[0].ids[-1]) if isinstance(encoded, Encoded) else None
        if last is not None and (last in tokenizer.added_tokens_decoder or last == tokenizer.eos_token_id):
            stops[last] = None
    return tuple(stops)


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """Return the tokenizers library's own, set up as transformers would for whole texts, where a call does nothing but call it;
    it can leave out where tokens begin, which takes a quarter of the time."""
    called = ("__call__", "_encode_plus", "_convert_encoding")
    kind = type(tokenizer)
    if not isinstance(tokenizer, TokenizersBackend) or any(getattr(kind, n) is not getattr(TokenizersBackend, n) for n in called):
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary."""
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.blake2b(repr(vocabulary).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _unscored(encoded: Encoded) -> Encoded:
    completions = tuple(Completion(each.ids, np.zeros_like(each.scored)) for each in encoded.completions)
    return replace(encoded, completions=completions, logps=None)
