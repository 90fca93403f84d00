"""Per-token numbers of every rollout in a data set, computed once: in memory on every rank, and on disk for a resume."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

FILE = "rollouts.safetensors"


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
    """Log-probs under the policy that sampled and under the reference, and values; None where the loss needs none."""

    old: Ragged
    reference: Ragged | None
    values: Ragged | None


def save(directory: Path, cache: RolloutCache) -> None:
    parts = {"old": cache.old, "reference": cache.reference, "values": cache.values}
    flat = {name: part.flat for name, part in parts.items() if part is not None}
    save_file({**flat, "starts": cache.old.starts}, directory / FILE)


def load(directory: Path) -> RolloutCache:
    arrays = load_file(directory / FILE)
    starts = arrays["starts"]
    old, reference, values = (Ragged(arrays[name], starts) if name in arrays else None for name in ("old", "reference", "values"))
    assert old is not None, "save() writes it"
    return RolloutCache(old, reference, values)
