"""Completions in steps with a label for each: parsed from a row, and tokenised so that every step ends in a token of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halos.data.encoded import Encoded
from halos.data.messages import turns_of
from halos.data.numbers import number_in
from halos.data.omissions import SENTINEL
from halos.data.template import Template
from halos.errors import UserError
from halos.examples import Completion, Stepwise, Turns

COLUMNS = ("prompt", "completions", "labels")


def stepwise(columns: Mapping[str, Any], where: str) -> Stepwise:
    """Parse a row in TRL's form: `completions` is a list of steps, `labels` has one for each.

    Raises UserError, naming the row.
    """
    steps = columns["completions"]
    if not _is_list(steps) or not all(isinstance(step, str) for step in steps):
        raise UserError(f"{where}: completions is {_shown(steps)}, not a list of steps, each of them text")
    if not steps:
        raise UserError(f"{where}: completions is empty: there is no step")
    for number, step in enumerate(steps):
        if not step.strip():
            raise UserError(f"{where}: completions[{number}] is {step!r}: a step without words")
    prompt = turns_of(columns["prompt"], "user", "prompt", where)
    turns = tuple({"role": "assistant", "content": step} for step in steps)
    return Stepwise(prompt, turns, labels_of(columns["labels"], len(steps), where))


def labels_of(values: Any, steps: int, where: str) -> tuple[float | None, ...]:
    """Check the labels of so many steps: true, false, or how likely a step is right. Raises UserError, naming the row."""
    if not _is_list(values):
        raise UserError(f"{where}: labels is {_shown(values)}, not a list with a label for each step")
    if len(values) != steps:
        raise UserError(f"{where}: {len(values)} labels for {steps} steps: each step has one")
    labels = list[float | None]()
    for number, value in enumerate(values):
        label = float(value) if isinstance(value, bool) else number_in(value)
        if label is None or not 0 <= label <= 1:
            raise UserError(f"{where}: labels[{number}] is {value!r}: a step's label is true, false, or a number from 0 to 1")
        labels.append(label)
    return tuple(labels)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _shown(value: Any) -> str:
    return shown if len(shown := repr(value)) <= 60 else f"{shown[:57]}..."


@dataclass(frozen=True, slots=True)
class StepTexts:
    """The text of a prompt and of its steps, each of which `separator` follows."""

    prompt: str
    steps: tuple[str, ...]  # the first with what the template writes before an answer
    separator: str
    labels: tuple[float | None, ...]
    exact: bool  # as that of a Layout
    notes: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return self.prompt, *self.steps, self.separator


def lay_out(template: Template, example: Stepwise, where: str) -> StepTexts:
    """Render the prompt as for an answer whose words are all steps. Raises UserError where the template changes these words."""
    texts = [str(turn["content"]) for turn in example.steps]
    words = example.separator.join(texts)
    layout = template.lay_out(example.prompt, [_answer(words)], where)
    text, opening = layout.completions[0], ""
    if text.count(words.strip()) > 1:  # what the template writes before an answer may have these words too
        marked = template.lay_out(example.prompt, [_answer(SENTINEL + words.lstrip())], where)
        opening = marked.completions[0].partition(SENTINEL)[0]
    found = text.find(words.strip(), len(opening))
    if found < 0 or not text.startswith(opening):
        raise UserError(f"{where}: the chat template changes the words of the steps: give another model.chat_template")
    steps = (text[:found] + texts[0].lstrip(), *texts[1:])
    return StepTexts(layout.prompt, steps, example.separator, example.step_labels, layout.exact, layout.notes)


def _answer(words: str) -> Turns:
    return ({"role": "assistant", "content": words},)


def encode(laid_out: StepTexts, ids: Mapping[str, Sequence[int]], where: str) -> Encoded:
    """Join the `ids` of each text, tokenised by itself, so that no token reaches over the end of a step. The last token of each
    separator is scored, where its step has a label."""
    parts, scored = list[int](), list[bool]()
    for step, label in zip(laid_out.steps, laid_out.labels, strict=True):
        for text in (step, laid_out.separator):
            if not ids[text]:
                raise UserError(f"{where}: the tokenizer makes no token of {_shown(text)}, which a step must end in")
            parts += ids[text]
        scored += [False] * (len(parts) - len(scored) - 1) + [label is not None]
    completion = Completion(np.array(parts, np.int32), np.array(scored))
    labels = np.array([label for label in laid_out.labels if label is not None], np.float32)
    prompt = np.array(ids[laid_out.prompt], np.int32)
    return Encoded(prompt, (completion,), laid_out.exact, merged=False, notes=laid_out.notes, step_labels=labels)
