"""How a model's tables grow with its vocabulary: new rows, a head's biases included, start at the mean of the old ones."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halos.errors import UserError

NAME = "vocabulary.json"
MOST = 2**24  # ids: a file that speaks of more is not ours


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a run knows of its ids. Saved beside an adapter: files of tokens do not tell which of them a base had."""

    size: int = 0  # how many ids the tokenizer has
    new: tuple[int, ...] = ()  # those of tokens that the base's tokenizer did not know

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[str]) -> "Vocabulary":
        known = tokenizer.get_vocab()
        return cls(len(tokenizer), tuple(sorted(known[token] for token in new_tokens)))

    def save(self, directory: Path) -> None:
        (directory / NAME).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, directory: Path) -> "Vocabulary | None":
        """What was saved in `directory`, or None. Raises UserError for what no run has saved."""
        path = directory / NAME
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
            size, new = values["size"], values["new"]
            sound = type(size) is int and 0 <= size <= MOST and all(type(each) is int and 0 <= each < size for each in new)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if not sound:
            raise UserError(f"{path} is no list of new ids below a size")
        return cls(size, tuple(new))


def table(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def fresh_rows(known: int, size: int, tokens: Sequence[int]) -> list[int]:
    """Rows that have learnt nothing yet: those of new `tokens`, and all beyond the `known` ones that the base has."""
    return sorted({*tokens, *range(known, size)})


def _untie_what_differs(model: PreTrainedModel) -> None:
    """Resizing ties what the configuration ties, two tables that were read apart included."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and table(head) is not table(embedding):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def grow(model: PreTrainedModel, size: int, tokens: Sequence[int]) -> None:
    """Make room for `size` ids, and let the rows of `tokens` and all new ones start at the mean of the older ones."""
    known = len(table(model.get_input_embeddings()))
    if size > known:
        _untie_what_differs(model)
        model.resize_token_embeddings(size, mean_resizing=False)
    if not (rows := fresh_rows(known, size, tokens)):
        return
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    tables = [table(layer) for layer in layers]
    tables += [bias for layer in layers if isinstance(bias := getattr(layer, "bias", None), Tensor)]
    with torch.no_grad():
        for weight in {id(each): each for each in tables}.values():
            weight[rows] = weight[: min(known, *rows)].mean(0, dtype=torch.float64).to(weight.dtype)
