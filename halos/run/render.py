"""Render an example as text, with its scored tokens (those whose log-prob the loss reads) in brackets."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from halos.examples import Completion, Item

LONGEST = 400  # characters shown of a prompt or a completion
OPEN, CLOSE = "⟦", "⟧"  # around scored tokens; text is unlikely to contain them


def render_example(item: Item, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Return the prompt and each completion by its name, with scored tokens in brackets."""
    parts = [(name, mark_scored(tokenizer, each)) for name, each in zip(names, item.completions, strict=True)]
    return [("prompt", decode_visibly(tokenizer, item.prompt)), *parts]


def mark_scored(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> str:
    """Return a completion's text with each run of scored tokens in brackets."""
    text, start = "", 0
    for scored, run in groupby(completion.scored.tolist()):
        end = start + len(list(run))
        part = decode_visibly(tokenizer, completion.ids[start:end])
        text, start = text + (f"{OPEN}{part}{CLOSE}" if scored else part), end
    return text


def decode_visibly(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | np.ndarray) -> str:
    """Decode to one line, with special tokens and escaped line ends, leaving out the middle of a long text."""
    text = tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)
    assert isinstance(text, str)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return text.replace("\n", "\\n").replace("\r", "\\r")
