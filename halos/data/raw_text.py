"""Text that is trained on as it is, without a chat template: a BOS where the tokenizer adds one, the text, an end token."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from halos.data.template import Layout
from halos.errors import UserError
from halos.examples import TEXT, Example, Message


def is_raw(example: Example) -> bool:
    first = example.completions[0]
    return len(first) == 1 and first[0]["role"] == TEXT


def layout(
    tokenizer: PreTrainedTokenizerBase, example: Example, notes_on: Callable[[Sequence[Message]], tuple[str, ...]]
) -> Layout:
    """Lay out an example that `is_raw`: all of it is scored but the BOS. Neither a BOS nor an end token is doubled.
    `notes_on` has what is to be counted of turns.

    Raises UserError for a tokenizer without an end token.
    """
    text, eos = str(example.completions[0][0]["content"]), tokenizer.eos_token
    if eos is None:
        raise UserError("the tokenizer has no end token, so no text could end")
    bos = str(tokenizer.bos_token) if _adds_bos(tokenizer) else ""
    text = text.removeprefix(bos)
    text = text.rstrip() if text.rstrip().endswith(eos) else text + eos
    notes = notes_on([{"role": TEXT, "content": text.removesuffix(eos)}])
    return Layout(bos, (text,), (((0, len(text)),),), exact=True, notes=notes)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
