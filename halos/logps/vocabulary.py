"""How a model's tables grow with its vocabulary: new rows start at the mean of the old ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def table(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def fresh_rows(known: int, size: int, tokens: Sequence[int]) -> list[int]:
    """Rows that have learnt nothing yet: those of new `tokens`, and all beyond the `known` ones that the base has."""
    return sorted({*tokens, *range(known, size)})


def grow(model: PreTrainedModel, size: int, tokens: Sequence[int]) -> None:
    """Make room for `size` ids, and let the rows of `tokens` and all new ones start at the mean of the older ones."""
    known = len(table(model.get_input_embeddings()))
    if size > known:
        model.resize_token_embeddings(size, mean_resizing=False)
    if not (rows := fresh_rows(known, size, tokens)):
        return
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    with torch.no_grad():
        for weight in {id(table(layer)): table(layer) for layer in layers}.values():
            weight[rows] = weight[: min(known, *rows)].float().mean(0).to(weight.dtype)
