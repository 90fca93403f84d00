"""What is known of every row of a data set, token by token: kept in memory by every process, and on the disk for a resume."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

FILE = "rollouts.safetensors"


@dataclass(frozen=True, slots=True)
class Per:
    """Numbers per scored token of each row, one row after the other."""

    flat: np.ndarray  # (tokens,) float32
    starts: np.ndarray  # (rows + 1,) int64

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "Per":
        return cls(np.concatenate(rows).astype(np.float32), np.cumsum([0, *map(len, rows)], dtype=np.int64))

    def rows(self, indices: np.ndarray, width: int) -> Tensor:
        """Padded with 0: (rows, width)."""
        padded = np.zeros((len(indices), width), np.float32)
        for place, row in enumerate(indices):
            part = self.flat[self.starts[row] : self.starts[row + 1]]
            padded[place, : len(part)] = part
        return torch.from_numpy(padded)


@dataclass(frozen=True, slots=True)
class Known:
    """Log-probs under the policy that sampled and under the reference, and values; None where the loss does not ask."""

    old: Per
    reference: Per | None
    values: Per | None


def save(directory: Path, known: Known) -> None:
    parts = {"old": known.old, "reference": known.reference, "values": known.values}
    flat = {name: part.flat for name, part in parts.items() if part is not None}
    save_file({**flat, "starts": known.old.starts}, directory / FILE)


def load(directory: Path) -> Known:
    found = load_file(directory / FILE)
    starts = found["starts"]
    old, reference, values = (Per(found[name], starts) if name in found else None for name in ("old", "reference", "values"))
    assert old is not None, "save() writes it"
    return Known(old, reference, values)
