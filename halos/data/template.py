"""Render turns as text: the prompt as a sampler gets it, the completions, and their scored spans."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos.confined import expanded
from halos.data.dates import may_write_date, with_date
from halos.data.endings import Ending, Endings, common
from halos.data.messages import REASONING, is_learned
from halos.data.omissions import OmissionCheck
from halos.data.preamble import with_preamble
from halos.data.rendering import Renderer, system_remedy
from halos.errors import UserError
from halos.examples import Message, Turns

# For tokenizers without a template: those of base models.
PLAIN = """\
{%- for message in messages %}
{%- if message['tool_calls'] or message['role'] == 'tool' %}
{{- raise_exception('the plain default knows no tool calls; give model.chat_template') }}
{%- elif message['role'] == 'user' %}{{- 'User: ' + message['content'] + '\n\n' }}
{%- elif message['role'] == 'assistant' %}{{- 'Assistant: ' + message['content'] + eos_token + '\n\n' }}
{%- else %}{{- message['content'] + '\n\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{% endif %}"""

Span = tuple[int, int]


def template_of_run(
    tokenizer: PreTrainedTokenizerBase, override: str | None, settings: Mapping[str, Any], system: str, day: date | None = None
) -> str:
    """Return the template to use: `chat_template` with data.chat_template_kwargs and data.system, which writes `day` where it
    writes a date; the one to save with the model is `dates.without_date` of it."""
    template = with_preamble(chat_template(tokenizer, override), settings, merges_system=system == "merge")
    return with_date(template, day) if day is not None and may_write_date(template) else template


def chat_template(tokenizer: PreTrainedTokenizerBase, override: str | None) -> str:
    """Return a chat template: `override` (jinja or a file), else the tokenizer's, else PLAIN.

    Rendered text is tokenised without adding special tokens, so PLAIN renders a BOS where the tokenizer would have added one.
    """
    if override is not None and "{" in override:
        return override
    if override is not None:
        path = expanded(override)
        if not path.is_file():
            raise UserError(f"model.chat_template={override}: no such file, and no jinja template either")
        return path.read_text("utf-8")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(tokenizer.chat_template)
        raise UserError(
            f"its tokenizer has several chat templates ({names}) and no default: model.chat_template=FILE chooses one"
        )
    if tokenizer.chat_template:
        return tokenizer.get_chat_template()
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return ("{{- bos_token }}" if adds_bos else "") + PLAIN


@dataclass(frozen=True, slots=True)
class Layout:
    """The text of one prompt and of each of its completions; `spans` are the scored characters of each completion."""

    prompt: str
    completions: tuple[str, ...]
    spans: tuple[tuple[Span, ...], ...]
    exact: bool  # the completions continue the template's generation prompt
    notes: tuple[str, ...] = ()  # to be counted: what is left out, and words that are read as special tokens


class TogetherError(UserError):
    """Scored turns of a conversation that cannot be one sequence: the template renders some otherwise once others follow."""


class LostError(Exception):
    """A row of which the template leaves out a part, and which is to be dropped; the message says which, for counts."""


class Template:
    """A tokenizer's chat template, and where it places the assistant's turns. `lost` is what becomes of a row of which it leaves
    out a part: error, drop (LostError) or keep."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, lost: str = "error") -> None:
        self._lost = lost
        self._tokenizer = tokenizer
        self._render = Renderer(tokenizer, chat_template(tokenizer, None), refuse_tools=lost == "error")
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        self._special = any_of(special)
        self._added = any_of([*special, *map(str, added)])
        self._endings = Endings(
            lambda turns: self._render(turns, "a turn", generate=False), self._special, self._added, bos=tokenizer.bos_token,
            eos=tokenizer.eos_token,
        )  # fmt: skip
        self._row_check = OmissionCheck(lambda turns: self._render(turns, "a row", generate=False))
        self._prompt_check = OmissionCheck(lambda turns: self._render(turns, "a prompt", generate=True))

    def lay_out(self, prompt: Turns, completions: Sequence[Turns], where: str, *, cut: Sequence[bool] = ()) -> Layout:
        """Render a prompt and its completions, without an end token where they are `cut`. Raises UserError, naming the row, where
        the template refuses or omits a part."""
        start = self._render(prompt, where, generate=True)
        notes = dict.fromkeys(self.notes_on((*prompt, *chain(*completions))))
        rendered = [self._render_completion(prompt, turns, start, where, notes, cut=bool(cut) and cut[n])
                    for n, turns in enumerate(completions)]  # fmt: skip
        # Completions of one prompt share its tokens, so the prompt ends where the first of them deviates from `start`.
        end = min(spans[0][0] for _, spans, _ in rendered)
        assert all(text.startswith(start[:end]) for text, _, _ in rendered)
        texts = tuple(text[end:] for text, _, _ in rendered)
        spans = tuple(((0, spans[0][1] - end), *((a - end, b - end) for a, b in spans[1:])) for _, spans, _ in rendered)
        return Layout(start[:end], texts, spans, all(exact for _, _, exact in rendered), tuple(notes))

    def notes_on(self, turns: Sequence[Message]) -> tuple[str, ...]:
        """Return what is to be counted of turns in whose words is the text of a special token."""
        token = next((found[0] for turn in turns if (found := self._lookalike(turn))), None)
        return (f"have the text of a special token in their words ({token}), which becomes that token",) if token else ()

    def generation_prompt(self, prompt: Turns, where: str) -> str:
        """Return the text that a sampler gets for `prompt`."""
        text = self._render(prompt, where, generate=True)
        for part in self._prompt_check.missing(prompt, text):
            if part.needed:
                raise part.refusal(where)
        return text

    def _lookalike(self, turn: Message) -> re.Match[str] | None:
        """Find the text of a special token in what a turn says: the tokenizer would read it as that token."""
        calls = [json.dumps(call, ensure_ascii=False, default=str) for call in turn.get("tool_calls") or ()]
        texts = (turn.get("content"), turn.get(REASONING), *calls)
        return next((found for words in texts if words and (found := self._special.search(words))), None)

    def _render_completion(
        self, prompt: Turns, completion: Turns, start: str, where: str, notes: dict[str, None], *, cut: bool
    ) -> tuple[str, list[Span], bool]:
        """Return the text of prompt and completion up to its end token, or to its last word where it is `cut`; its assistant
        turns' spans; and whether all are exact."""
        learned = [n for n, turn in enumerate(completion) if is_learned(turn)]
        turns = (*prompt, *completion[: learned[-1] + 1])
        full = self._render(turns, where, generate=False)
        text, spans, exact = full, [], True
        for n in learned:
            before, turn = (*prompt, *completion[:n]), completion[n]
            ending = self._endings.of(turn, before)
            opening = start if n == 0 else self._render(before, where, generate=True)
            if n != learned[-1]:
                upto = self._render((*before, turn), where, generate=False)
                end = self._end_within(full, upto, turn, ending, where)
            else:
                upto, text = full, full[: self._end_of_words(full, turn, ending)] if cut else self._ended(full, turn, ending)
                end = len(text)
            spans.append((self._start(before, turn, opening, upto, where), end))
            exact &= spans[-1][0] == len(opening)
        for part in self._row_check.missing(turns, full, learned=[len(prompt) + n for n in learned]):
            if part.needed and self._lost == "error":
                raise part.refusal(where, "; data.lost=drop or keep drops such rows, or keeps them as they are rendered")
            if part.needed and self._lost == "drop":
                raise LostError(f"of which the chat template leaves out {part.what}")
            notes[f"lose {part.what}, which the chat template leaves out"] = None
        return text, spans, exact

    def _start(self, before: Turns, turn: Message, opening: str, full: str, where: str) -> int:
        """Return where the assistant's turn begins in `full`: after the generation prompt, as far as `full` contains it."""
        if full.startswith(opening):
            return len(opening)
        bare = self._render(before, where, generate=False)
        cut = common(opening, full)
        content = str(turn.get("content") or "").strip()
        if content and (at := full.find(content, len(bare))) >= 0:
            cut = min(cut, at)
        for text in (opening, full):  # never inside a token: <think> and <b> share their first character
            cut = next((m.start() for m in self._added.finditer(text) if m.start() < cut < m.end()), cut)
        if not full.startswith(bare) or cut < len(bare):
            raise UserError(
                f"{where}: the chat template renders the prompt differently once it is answered; give another template"
                + system_remedy(before)
            )
        return cut

    def _end_within(self, full: str, upto: str, turn: Message, ending: Ending, where: str) -> int:
        """Return the index in `full` after the end token of a turn that others follow; `upto` is the text that ends with it."""
        at = self._end_of_words(upto, turn, ending)
        if full[:at] != upto[:at]:
            raise TogetherError(
                f"{where}: the chat template changes an assistant turn once others follow it, so not all of them can be "
                "scored in one row; use data.score=last"
            )
        after, end = full[at:].lstrip(), len(upto) - len(ending.rest)
        if ending.written and ending.everywhere and upto.endswith(ending.token + ending.rest) and full[:end] == upto[:end]:
            return end
        if not ending.written and after.startswith(ending.token):
            return len(full) - len(after) + len(ending.token)
        raise TogetherError(
            f"{where}: the chat template writes no end token after an assistant turn that others follow, so a model would not"
            " learn to end it; use data.score=last, or another model.chat_template"
        )

    def _ended(self, full: str, turn: Message, ending: Ending) -> str:
        """Return `full` up to the end token of its last turn: the template's, else the tokenizer's in its place."""
        if ending.written and ending.token and full.endswith(ending.token + ending.rest):
            return full[: len(full) - len(ending.rest)]
        at = self._end_of_words(full, turn, ending)
        if ending.written and (end := self._special.search(full, at) or self._added.search(full, at)):
            return full[: end.end()]
        token = self._tokenizer.eos_token if ending.written else ending.token
        if token is None:
            raise UserError("neither the chat template nor the tokenizer has an end token, so no completion could end")
        return full[:at] + full[at:].rstrip() + token

    def _end_of_words(self, full: str, turn: Message, ending: Ending) -> int:
        if full.endswith(ending.tail):
            return len(full) - len(ending.tail)
        content = str(turn.get("content") or "").strip()
        content_start = full.rfind(content) if content and not turn.get("tool_calls") else -1
        return content_start + len(content) if content_start >= 0 else self._last_token(full)

    def _last_token(self, full: str) -> int:
        """Return the index of the special token that ends `full`; its length where there is none."""
        matches = [m for m in self._special.finditer(full) if not full[m.end() :].strip()]
        return matches[0].start() if matches else len(full)


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches each of `tokens`, a longer one before one that it contains."""
    longest_first = sorted(set(filter(None, tokens)), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
