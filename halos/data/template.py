"""From turns to text: what a sampler would be fed, what the assistant then says, and which of it is scored."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from halos.confined import expanded
from halos.data.messages import WEIGHT, is_learned
from halos.data.omissions import OmissionCheck
from halos.errors import UserError
from halos.types import Message, Turns

# For tokenizers that come without a template, which belong to base models.
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


def chat_template(tokenizer: PreTrainedTokenizerBase, override: str | None) -> str:
    """The template to use and to save with the model: `override` (jinja, or a file of it), else the tokenizer's, else PLAIN.

    Text is tokenised without further special tokens, so PLAIN renders a BOS where the tokenizer would have added one.
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
    """The text of one prompt and of each completion that follows it; `spans` are the scored characters of each."""

    prompt: str
    completions: tuple[str, ...]
    spans: tuple[tuple[Span, ...], ...]
    exact: bool  # False where the text after the template's own generation prompt does not continue it


class Template:
    """A tokenizer's chat template, and what it puts around the assistant's words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._jinja = chat_template(tokenizer, None)
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        self._special = any_of(special)
        self._added = any_of([*special, *map(str, added)])
        self._suffix: str | None = None
        self._of_rows = OmissionCheck(lambda turns: self._render(turns, "a row", generate=False))
        self._of_prompts = OmissionCheck(lambda turns: self._render(turns, "a prompt", generate=True))

    def lay_out(self, prompt: Turns, completions: Sequence[Turns], where: str) -> Layout:
        """Raises UserError with the row's place where the template refuses it or hides what is to be scored."""
        start = self._render(prompt, where, generate=True)
        placed = [self._place(prompt, turns, start, where) for turns in completions]
        # Completions of one prompt share its tokens, so the prompt ends where the first of them leaves the template's.
        cut = min(spans[0][0] for _, spans, _ in placed)
        assert all(text.startswith(start[:cut]) for text, _, _ in placed)
        texts = tuple(text[cut:] for text, _, _ in placed)
        spans = tuple(((0, spans[0][1] - cut), *((a - cut, b - cut) for a, b in spans[1:])) for _, spans, _ in placed)
        return Layout(start[:cut], texts, spans, all(exact for _, _, exact in placed))

    def generation_prompt(self, prompt: Turns, where: str) -> str:
        """What a sampler is fed for `prompt`."""
        text = self._render(prompt, where, generate=True)
        self._of_prompts.refuse(prompt, text, where)
        return text

    def _render(self, turns: Iterable[Message], where: str, *, generate: bool) -> str:
        # transformers drops keys without value from 5.18 on; templates print None where they meet it.
        plain = [{name: value for name, value in turn.items() if value is not None and name != WEIGHT} for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(
                plain, chat_template=self._jinja, tokenize=False, add_generation_prompt=generate
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{where}: the chat template refuses this row: {error}") from error
        assert isinstance(text, str)
        return text

    def _place(self, prompt: Turns, completion: Turns, start: str, where: str) -> tuple[str, list[Span], bool]:
        """The text of prompt and completion up to its end token, the spans of its assistant turns, and if all are exact."""
        said = [n for n, turn in enumerate(completion) if is_learned(turn)]
        turns = (*prompt, *completion[: said[-1] + 1])
        whole = self._render(turns, where, generate=False)
        text, spans, exact = whole, [], True
        for n in said:
            before, turn = (*prompt, *completion[:n]), completion[n]
            upto = whole if n == said[-1] else self._render((*before, turn), where, generate=False)
            opening = start if n == 0 else self._render(before, where, generate=True)
            text, end = self._ended(before, turn, upto, where, last=n == said[-1])
            if n != said[-1] and whole[:end] != text[:end]:
                raise UserError(
                    f"{where}: the chat template changes an assistant turn once others follow it, so not all of them can be "
                    "scored in one row; use data.score=last"
                )
            spans.append((self._begun(before, turn, opening, upto, where), end))
            exact &= spans[-1][0] == len(opening)
        self._of_rows.refuse(turns, whole, where, learned=[len(prompt) + n for n in said])
        return text, spans, exact

    def _begun(self, before: Turns, turn: Message, opening: str, full: str, where: str) -> int:
        """Where the assistant's part of `full` begins: after the generation prompt, as far as `full` has it."""
        if full.startswith(opening):
            return len(opening)
        bare = self._render(before, where, generate=False)
        cut = _common(opening, full)
        content = str(turn.get("content") or "").strip()
        if content and (at := full.find(content, len(bare))) >= 0:
            cut = min(cut, at)
        for text in (opening, full):  # never within a token: <think> and <b> share their first character
            cut = next((m.start() for m in self._added.finditer(text) if m.start() < cut < m.end()), cut)
        if not full.startswith(bare) or cut < len(bare):
            raise UserError(f"{where}: the chat template renders the prompt differently once it is answered; give another")
        return cut

    def _ended(self, before: Turns, turn: Message, full: str, where: str, *, last: bool) -> tuple[str, int]:
        """`full` and the place just after the end token that follows the assistant's words.

        Where the template writes none, the last turn gets the tokenizer's end token, and an earlier one ends unmarked.
        """
        suffix = self._after_content(before, where)
        if full.endswith(suffix):
            at = len(full) - len(suffix)
        else:
            content = str(turn.get("content") or "").strip()
            found = full.rfind(content) if content and not turn.get("tool_calls") else -1
            at = found + len(content) if found >= 0 else self._last_token(full)
        if end := self._special.search(full, at) or self._added.search(full, at):
            return full[: end.end()] if last else full, end.end()
        if not last:
            return full, at
        if self._tokenizer.eos_token is None:
            raise UserError("neither the chat template nor the tokenizer has an end token, so no completion could end")
        full = full[:at] + full[at:].rstrip() + self._tokenizer.eos_token
        return full, len(full)

    def _after_content(self, before: Turns, where: str) -> str:
        """What the template writes after the words of a conversation's last assistant turn."""
        if self._suffix is None:
            one, other = (self._render((*before, {"role": "assistant", "content": word}), where, generate=False) for word in "xy")
            self._suffix = one[len(one) - _common(one[::-1], other[::-1]) :]
        return self._suffix

    def _last_token(self, full: str) -> int:
        """Where the special token stands that closes `full`; its end where there is none."""
        found = [m for m in self._special.finditer(full) if not full[m.end() :].strip()]
        return found[0].start() if found else len(full)


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches each of `tokens`, a longer one before one that it contains."""
    longest_first = sorted(set(filter(None, tokens)), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _common(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
