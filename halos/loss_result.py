"""What a loss returns: values that are not reduced, with their denominators, and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halos.errors import UserError


@dataclass(frozen=True, slots=True)
class Mean:
    """A total and its count, kept separate so that a mean over micro-batches and ranks is exact."""

    total: Tensor  # ()
    count: Tensor  # ()

    @classmethod
    def of(cls, values: Tensor, where: Tensor | None = None) -> Mean:
        """The mean of `values`, or of those where the boolean `where` is true; both have the same shape."""
        values = values.detach().float()
        if where is None:
            return cls(values.sum(), values.new_full((), values.numel()))
        return cls(torch.where(where, values, 0.0).sum(), where.sum().float())


@dataclass(frozen=True, slots=True)
class Loss:
    """Unreduced: the trainer sums `values` and divides by a denominator counted over the whole global batch."""

    values: Tensor  # (rows,) or (rows, time); of a sum (rows,), which are not reduced together: each part is
    metrics: Mapping[str, Mean]
    # the denominator: items (pairs, examples) of the global batch; their scored tokens; or those of one of their completions,
    # by its name: chosen_token, rejected_token
    per: str = "item"
    parts: Mapping[str, Loss] = field(default_factory=dict)  # of a sum

    @classmethod
    def sum(cls, **parts: Loss) -> Loss:
        """The sum of losses with denominators of their own. The metric `loss` is its value, and `loss/NAME` that of each part; of
        metrics of one name the last part's is kept. Raises UserError for two terms of one name."""
        flat, part_of = dict[str, Loss](), dict[str, str]()
        for name, part in parts.items():
            for term, each in ({f"{name}_{inner}": each for inner, each in part.parts.items()} or {name: part}).items():
                if term in flat:
                    raise UserError(
                        f"a sum of losses has the term {term} twice, of {part_of[term]} and of {name}: give {name} another name"
                    )
                flat[term], part_of[term] = each, name
        values = [each.values.sum(-1) if each.values.ndim > 1 else each.values for each in flat.values()]
        metrics = {name: mean for part in parts.values() for name, mean in part.metrics.items()}
        return cls(torch.stack(values).sum(0), metrics, parts=flat)

    @property
    def terms(self) -> Mapping[str, Loss]:
        """What is summed and divided, each by its own denominator, under the names of its metrics."""
        return {f"loss/{name}": part for name, part in self.parts.items()} or {"loss": self}
