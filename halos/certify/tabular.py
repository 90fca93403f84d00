"""A table in the place of a model: the log-probs, values and scores of each sequence are its parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from halos.types import TOKEN_STATISTICS, Acted, PackRow, TokenLogps

Shift = Callable[[PackRow], float]  # nats that a sequence is made more likely by


def nothing(row: PackRow) -> float:
    return 0.0


@dataclass
class Table:
    """Its output for a sequence is a function of the sequence and `seed` alone, as a model's of its weights.

    Gradients add up in the entries over any number of micro-batches, however these are cut, ordered and padded.
    """

    seed: int
    dtype: torch.dtype = torch.float64
    head: str = "language"
    statistics: tuple[str, ...] = ()
    shift: Shift = nothing
    scale: float = 1.0
    values: float = 1.0  # scale of a value head's output
    candidates: int = 0  # further ids of each scored token, whose log-probs it gives too
    entries: dict[bytes, dict[str, Tensor]] = field(default_factory=dict)

    def entry(self, row: PackRow) -> dict[str, Tensor]:
        """The parameters of a sequence: logps (scored tokens,), with a value head values (scored tokens,) too; of reward models
        score (), or logits (scored tokens, 2)."""
        if (key := key_of(row)) not in self.entries:
            self.entries[key] = {name: _rounded(part, self.dtype) for name, part in self._draw(key, row).items()}
        return self.entries[key]

    def _draw(self, key: bytes, row: PackRow) -> dict[str, np.ndarray]:
        """Log-probs from -3 to 0, moved by the shift; in the same order whatever is needed of them, so that tables agree."""
        count, shift = int(row[1].scored.sum()), self.shift(row)
        uniform, normal, score, more = _drawn(key, self.seed, count)
        if self.head == "score":
            return {"score": np.array(self.scale * score + shift)}
        if self.head == "steps":
            return {"logits": self.scale * np.stack([-normal, normal + shift], -1)}
        parts = {"logps": self.scale * (-3 * uniform + shift / max(1, count))}
        parts |= {"values": self.scale * self.values * normal} if self.head == "value" else {}
        parts |= {"candidates": self.scale * _of_candidates(key, self.seed, count, self.candidates)} if self.candidates else {}
        return parts | {name: 2 * draw if name == "entropy" else -3 * draw
                        for name, draw in zip(TOKEN_STATISTICS, more, strict=True) if name in self.statistics}  # fmt: skip

    def output(self, rows: Sequence[PackRow], padding: int = 0) -> TokenLogps | Acted | Tensor:
        """What a model with this head gives for `rows`, padded by so many more positions than they need."""
        entries = [self.entry(row) for row in rows]
        if self.head == "score":
            return torch.stack([entry["score"] for entry in entries])
        lengths = torch.tensor([len(next(iter(entry.values()))) for entry in entries])
        mask = torch.arange(max(1, int(lengths.max())) + padding) < lengths[:, None]
        columns = {name: padded([entry[name] for entry in entries], mask.shape[1]) for name in entries[0]}
        if self.head == "steps":
            return columns["logits"]
        statistics = {name: columns[name] for name in (*TOKEN_STATISTICS, "candidates") if name in columns}
        logps = TokenLogps(columns["logps"], mask, **statistics)
        return Acted(logps, columns["values"]) if self.head == "value" else logps

    def gradient(self, row: PackRow, name: str = "") -> Tensor:
        """The gradient of a sequence's log-probs, or its score: zeros where nothing flowed."""
        entry = self.entry(row)
        leaf = entry[name] if name else next(iter(entry.values()))
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def gradients(self) -> dict[str, Tensor]:
        """All gradients, by sequence and name."""
        named = {f"{key.hex()}/{name}": leaf for key, entry in self.entries.items() for name, leaf in entry.items()}
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in named.items()}


@cache  # all losses of a kind are proved on the same rows
def _drawn(key: bytes, seed: int, count: int) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    random = np.random.default_rng(list(hashlib.sha256(key + seed.to_bytes(4, "little")).digest()))
    return random.random(count), random.standard_normal(count), random.standard_normal(), random.random((2, count))


@cache
def _of_candidates(key: bytes, seed: int, count: int, candidates: int) -> np.ndarray:
    """Log-probs of so many ids of each token, which leave some probability to all others."""
    random = np.random.default_rng(list(hashlib.sha256(b"candidates" + key + seed.to_bytes(4, "little")).digest()))
    logits = random.standard_normal((count, candidates + 1))
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:, :-1]


def key_of(row: PackRow) -> bytes:
    prompt, completion = row
    return b"|".join(np.ascontiguousarray(part, np.int64).tobytes() for part in (prompt, completion.ids, completion.scored))


def padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """Ragged rows as (rows, width, ...), 0 beyond the end of each."""
    return torch.stack([pad(row, (*[0] * 2 * (row.ndim - 1), 0, width - len(row))) for row in rows])


def _rounded(part: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A parameter whose numbers are those of float32 in every dtype."""
    return torch.from_numpy(np.asarray(part)).float().to(dtype).requires_grad_()
