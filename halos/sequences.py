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

    @property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each sequence, where none shares its prompt."""
        assert all(len(tree) == 1 for tree in self.trees), "these sequences share prompts"
        return tuple(tree[0] for tree in self.trees)

    def to(self, device: torch.device) -> Sequences:
        names = ("ids", "positions", "targets", "sources", "rows", "columns", "reference")
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
    refers: bool = False  # the buffer ends with the reference's log-probs

    def with_reference(self, logps: np.ndarray) -> HostSequences:
        """With the targets' log-probs under the reference: (scored,) float32, in the order of the leaves."""
        assert not self.refers
        assert logps.dtype == np.float32
        assert 4 * len(logps) == len(self.buffer) - 2 * self.tokens
        return replace(self, buffer=torch.cat([self.buffer, torch.from_numpy(logps).view(torch.int32)]), refers=True)

    def pinned(self, device: torch.device) -> HostSequences:
        """The same, in memory from which `device` copies by itself."""
        return replace(self, buffer=pinned(self.buffer, device))

    def to(self, device: torch.device) -> Sequences:
        scored, buffer = (len(self.buffer) - 2 * self.tokens) // (5 if self.refers else 4), to_device(self.buffer, device)
        numbers, logps = buffer.split([2 * self.tokens + 4 * scored, scored]) if self.refers else (buffer, None)
        parts = numbers.long().split([self.tokens] * 2 + [scored] * 4)
        ids, positions, targets, sources, rows, columns = parts
        reference = logps.view(torch.float32) if logps is not None else None
        return Sequences(ids, positions, self.trees, self.leaves, targets, sources, rows, columns, self.widest, reference)


@dataclass(frozen=True, slots=True)
class WholeModelInput:
    """One sequence for the unmodified transformers forward: passed in the place of `Sequences` through DDP, FSDP and the like."""

    ids: Tensor  # (tokens,) int64
