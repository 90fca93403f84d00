"""Limits of sequence length: a table of position embeddings is a hard one, the configured length of rotary positions is not."""

from dataclasses import dataclass

from torch import nn

from halos.logps.model import bare

MAX_EXTRA_ROWS = 8  # rows of a table of positions beyond the configured number: OPT's has 2


@dataclass(frozen=True, slots=True)
class Limits:
    """`configured` is the config's max_position_embeddings, None where it has none; `hard` is the same number where the model has
    a table with a row for each position, else None."""

    configured: int | None
    hard: int | None


def limits(model: nn.Module) -> Limits:
    """Return the limits of a model. A table of positions is recognised by its number of rows, and not by its name."""
    inner = bare(model)
    configured = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(configured, int) or configured < 1:
        return Limits(None, None)
    tokens = inner.get_input_embeddings()
    tables = [module.num_embeddings for module in inner.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    sizes = [size for buffer in inner.buffers() if buffer.dim() > 1 for size in buffer.shape]
    ends = any(configured <= rows <= configured + MAX_EXTRA_ROWS for rows in tables) or configured in sizes
    return Limits(configured, configured if ends else None)


def smaller(one: Limits, other: Limits) -> Limits:
    """Return the tighter limits of two models that read the same sequences."""
    return Limits(_least(one.configured, other.configured), _least(one.hard, other.hard))


def longest_allowed(limits: Limits, max_length: int) -> int:
    """Return `max_length`, or the hard limit where that is smaller."""
    return min(max_length, limits.hard or max_length)


def _least(one: int | None, other: int | None) -> int | None:
    return min((each for each in (one, other) if each is not None), default=None)
