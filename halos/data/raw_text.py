"""Text that is trained on as it is, without a chat template: a BOS where the tokenizer adds one, the text, an end token."""

from transformers import PreTrainedTokenizerBase

from halos.data.template import Layout
from halos.errors import UserError
from halos.examples import TEXT, Example


def is_raw(example: Example) -> bool:
    first = example.completions[0]
    return len(first) == 1 and first[0]["role"] == TEXT


def layout(tokenizer: PreTrainedTokenizerBase, example: Example) -> Layout:
    """Lay out an example that `is_raw`: all of it is scored but the BOS. Neither a BOS nor an end token is doubled.

    Raises UserError for a tokenizer without an end token.
    """
    text, eos = str(example.completions[0][0]["content"]), tokenizer.eos_token
    if eos is None:
        raise UserError("the tokenizer has no end token, so no text could end")
    bos = str(tokenizer.bos_token) if _adds_bos(tokenizer) else ""
    text = text.removeprefix(bos) + ("" if text.rstrip().endswith(eos) else eos)
    return Layout(bos, (text,), (((0, len(text)),),), exact=True)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
