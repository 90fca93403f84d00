"""Per-token numbers of every rollout in a data set, computed once: in memory on every rank, and on disk for a resume."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

FILE = "rollouts.safetensors"
NAMES = ("old", "sampled", "reference", "values")


@dataclass(frozen=True, slots=True)
class Ragged:
    """One number for each scored token of each row, rows concatenated."""

    flat: np.ndarray  # (tokens,) float32
    starts: np.ndarray  # (rows + 1,) int64

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "Ragged":
        return cls(np.concatenate(rows).astype(np.float32), np.cumsum([0, *map(len, rows)], dtype=np.int64))

    def rows(self, indices: np.ndarray, width: int) -> Tensor:
        """The rows at `indices`, padded with 0: (rows, width)."""
        padded = np.zeros((len(indices), width), np.float32)
        for n, row in enumerate(indices):
            values = self.flat[self.starts[row] : self.starts[row + 1]]
            padded[n, : len(values)] = values
        return torch.from_numpy(padded)


@dataclass(frozen=True, slots=True)
class RolloutCache:
    """Numbers of rollouts that do not change while the policy learns from them; None where they are not needed or not known."""

    old: Ragged | None  # the trainer's own log-probs under the policy that sampled; in caches of older versions the sampler's
    sampled: Ragged | None  # the sampler's, NaN in rows without
    reference: Ragged | None  # log-probs under the reference
    values: Ragged | None  # of the value head
    kl_coefficient: float | None = None  # of a live batch whose loss adapts it: that of its first step
    step: int = -1  # of the policy that `old` and `values` come from; -1: an older version did not record it


def save(directory: Path, cache: RolloutCache) -> None:
    assert cache.old is not None, "of a data set it is always computed"
    parts = {name: part.flat for name in NAMES if (part := getattr(cache, name)) is not None}
    numbers = {"step": np.array(cache.step)}
    numbers |= {} if cache.kl_coefficient is None else {"kl_coefficient": np.array(cache.kl_coefficient)}
    save_file({**parts, "starts": cache.old.starts, **numbers}, directory / FILE)


def load(directory: Path) -> RolloutCache:
    arrays = load_file(directory / FILE)
    parts = {name: Ragged(arrays[name], arrays["starts"]) if name in arrays else None for name in NAMES}
    coefficient = float(arrays["kl_coefficient"]) if "kl_coefficient" in arrays else None
    return RolloutCache(**parts, kl_coefficient=coefficient, step=int(arrays.get("step", -1)))
