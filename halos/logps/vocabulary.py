"""Resize embeddings and head with the vocabulary: new rows, a head's biases included, start at the mean of the old ones."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halos.errors import UserError

NAME = "vocabulary.json"
MAX_SIZE = 2**24  # ids: a file with more was not written by a run


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A run's token ids. Saved next to an adapter, since a tokenizer's files do not say which of its tokens the base had."""

    size: int = 0  # number of ids of the tokenizer
    new: tuple[int, ...] = ()  # ids of tokens that the base's tokenizer did not have

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[str]) -> "Vocabulary":
        known = tokenizer.get_vocab()
        return cls(len(tokenizer), tuple(sorted(known[token] for token in new_tokens)))

    def save(self, directory: Path) -> None:
        (directory / NAME).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, directory: Path) -> "Vocabulary | None":
        """The vocabulary saved in `directory`, or None. Raises UserError for a file that no run wrote."""
        path = directory / NAME
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
            size, new = values["size"], values["new"]
            sound = type(size) is int and 0 <= size <= MAX_SIZE and all(type(each) is int and 0 <= each < size for each in new)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if not sound:
            raise UserError(f"{path} does not hold a size and a list of new ids below it")
        return cls(size, tuple(new))


def table(layer: nn.Module) -> Tensor:
    """The weight of an embedding or output layer: (vocabulary, hidden)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def fresh_rows(known: int, size: int, tokens: Sequence[int]) -> list[int]:
    """Untrained rows of the tables: those of the new `tokens`, and all beyond the base's `known` rows."""
    return sorted({*tokens, *range(known, size)})


def _untie_separate_tables(model: PreTrainedModel) -> None:
    """Resizing ties embedding and head where the configuration says so, even where they were loaded as two tables: prevent it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and table(head) is not table(embedding):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def grow(model: PreTrainedModel, size: int, tokens: Sequence[int]) -> None:
    """Resize to at least `size` ids; the rows of `tokens` and all added rows start at the mean of the older ones."""
    known = len(table(model.get_input_embeddings()))
    if size > known:
        _untie_separate_tables(model)
        model.resize_token_embeddings(size, mean_resizing=False)
    if not (rows := fresh_rows(known, size, tokens)):
        return
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    tables = [table(layer) for layer in layers]
    tables += [bias for layer in layers if isinstance(bias := getattr(layer, "bias", None), Tensor)]
    with torch.no_grad():
        for weight in {id(each): each for each in tables}.values():
            weight[rows] = weight[: min(known, *rows)].mean(0, dtype=torch.float64).to(weight.dtype)
