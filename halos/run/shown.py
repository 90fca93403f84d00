"""A row as people read it: the text that its tokens stand for, and which of them are scored."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from halos.examples import Completion, Item

LONGEST = 400  # characters of one part that are shown
OPEN, CLOSE = "⟦", "⟧"  # around what is scored; no text is likely to have them


def rendered(item: Item, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """The prompt, and each completion under its name, with what is scored of it in brackets."""
    parts = [(name, marked(tokenizer, each)) for name, each in zip(names, item.completions, strict=True)]
    return [("prompt", visible(tokenizer, item.prompt)), *parts]


def marked(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> str:
    """A completion's text, each run of scored tokens in brackets."""
    text, start = "", 0
    for scored, run in groupby(completion.scored.tolist()):
        end = start + len(list(run))
        part = visible(tokenizer, completion.ids[start:end])
        text, start = text + (f"{OPEN}{part}{CLOSE}" if scored else part), end
    return text


def visible(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray) -> str:
    """Special tokens and ends of lines included, on one line, the middle of a long text left out."""
    text = tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)
    assert isinstance(text, str)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return text.replace("\n", "\\n").replace("\r", "\\r")
