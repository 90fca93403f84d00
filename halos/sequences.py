"""Inputs of a model: sequences packed end to end, without padding, and prompts that they share stored once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from halos.transfer import pinned, to_device

Tree = tuple[int, ...]  # tokens of the trunk, then of each branch; a sequence that shares no prompt is a trunk alone


@dataclass(frozen=True, slots=True)
class Sequences:
    """Sequences packed end to end as trees: a prompt that several sequences share is stored once, as the trunk of their tree.

    Scored tokens: those whose log-prob the loss reads. The LM head gets their `sources` alone.
    """

    ids: Tensor  # (tokens,) int64: of every tree its trunk, then its branches
    positions: Tensor  # (tokens,) int64: of each token in its own sequence; every branch begins where its trunk ends
    trees: tuple[Tree, ...]  # on the host, so that no kernel waits for it
    leaves: tuple[int, ...]  # for each sequence, in the order of the trees, its number among the rows
    targets: Tensor  # (scored,) int64: the ids of the scored tokens
    sources: Tensor  # (scored,) int64: index into `ids` of the hidden state that predicts each target
    rows: Tensor  # (scored,) int64: which sequence each target belongs to
    columns: Tensor  # (scored,) int64: index of each target among the scored tokens of its sequence
    widest: int  # largest number of scored tokens of any sequence
    reference: Tensor | None = None  # (scored,) float32: the targets' log-probs under the reference, where these are known
    likeliest: Tensor | None = None  # (scored, 2 k) float32: its k largest log-probs, then their ids

    @property
    def candidates(self) -> Tensor | None:
        """The ids that the reference holds for the likeliest in the place of each target: (scored, k) int64."""
        return None if self.likeliest is None else self.likeliest[:, self.likeliest.shape[1] // 2 :].long()

    @property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each sequence, where none shares its prompt."""
        assert all(len(tree) == 1 for tree in self.trees), "these sequences share prompts"
        return tuple(tree[0] for tree in self.trees)

    def to(self, device: torch.device) -> Sequences:
        names = ("ids", "positions", "targets", "sources", "rows", "columns", "reference", "likeliest")
        parts = {name: part for name in names if (part := getattr(self, name)) is not None}
        return replace(self, **{name: to_device(part, device) for name, part in parts.items()})


@dataclass(frozen=True, slots=True)
class HostSequences:
    """`Sequences` in host memory, in one buffer: one copy brings all of them to a device."""

    buffer: Tensor  # int32: ids, positions, targets, sources, rows and columns, end to end, and the bits of log-probs
    tokens: int  # of which ids and positions have one number each
    trees: tuple[Tree, ...]
    leaves: tuple[int, ...]
    widest: int
    refers: int = 0  # numbers of the reference for each target, with which the buffer ends

    def with_reference(self, logps: np.ndarray) -> HostSequences:
        """With the targets' log-probs under the reference: (scored,) float32, in the order of the leaves; with its k
        likeliest ids (scored, 1 + 2 k)."""
        assert not self.refers
        assert logps.dtype == np.float32
        assert 4 * len(logps) == len(self.buffer) - 2 * self.tokens
        table = torch.from_numpy(logps.reshape(-1)).view(torch.int32)
        return replace(self, buffer=torch.cat([self.buffer, table]), refers=1 if logps.ndim == 1 else logps.shape[1])

    def pinned(self, device: torch.device) -> HostSequences:
        """The same, in memory from which `device` copies by itself."""
        return replace(self, buffer=pinned(self.buffer, device))

    def to(self, device: torch.device) -> Sequences:
        scored, buffer = (len(self.buffer) - 2 * self.tokens) // (4 + self.refers), to_device(self.buffer, device)
        numbers, table = buffer.split([2 * self.tokens + 4 * scored, scored * self.refers]) if self.refers else (buffer, None)
        parts = numbers.long().split([self.tokens] * 2 + [scored] * 4)
        ids, positions, targets, sources, rows, columns = parts
        reference, likeliest = _columns(table.view(torch.float32), self.refers) if table is not None else (None, None)
        known = (self.widest, reference, likeliest)
        return Sequences(ids, positions, self.trees, self.leaves, targets, sources, rows, columns, *known)


def _columns(table: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """A table (scored * width,) of what a reference says: (scored,) and, where it is wider than 1, (scored, width - 1)."""
    return (table, None) if width == 1 else (table.view(-1, width)[:, 0], table.view(-1, width)[:, 1:])


@dataclass(frozen=True, slots=True)
class WholeModelInput:
    """One sequence for the unmodified transformers forward: passed in the place of `Sequences` through DDP, FSDP and the like."""

    ids: Tensor  # (tokens,) int64
