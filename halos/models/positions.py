"""How many tokens a row may have for a model: a table of positions ends somewhere, rotary ones only become unfamiliar."""

from dataclasses import dataclass

from torch import nn

from halos.logps.model import bare

MAX_EXTRA_ROWS = 8  # rows that a table of positions may have beyond them: OPT's has 2


@dataclass(frozen=True, slots=True)
class Limits:
    """`configured` is what the model's config says, None where it says nothing; `hard` is where its tables end."""

    configured: int | None
    hard: int | None


def limits(model: nn.Module) -> Limits:
    """A table is known by what it is, whatever it is called: of as many rows as the config has positions, and not of tokens."""
    inner = bare(model)
    configured = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(configured, int) or configured < 1:
        return Limits(None, None)
    words = inner.get_input_embeddings()
    tables = [module.num_embeddings for module in inner.modules() if isinstance(module, nn.Embedding) and module is not words]
    sizes = [size for buffer in inner.buffers() if buffer.dim() > 1 for size in buffer.shape]
    ends = any(configured <= rows <= configured + MAX_EXTRA_ROWS for rows in tables) or configured in sizes
    return Limits(configured, configured if ends else None)


def smaller(one: Limits, other: Limits) -> Limits:
    """Of two models that read the same rows."""
    return Limits(_least(one.configured, other.configured), _least(one.hard, other.hard))


def longest_allowed(limits: Limits, max_length: int) -> int:
    """`max_length`, or the positions that there are, where these are fewer."""
    return min(max_length, limits.hard or max_length)


def _least(one: int | None, other: int | None) -> int | None:
    return min((each for each in (one, other) if each is not None), default=None)
