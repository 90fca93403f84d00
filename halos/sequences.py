"""Inputs of a model: sequences packed end to end, without padding, and prompts that they share stored once."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    @property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each sequence, where none shares its prompt."""
        assert all(len(tree) == 1 for tree in self.trees), "these sequences share prompts"
        return tuple(tree[0] for tree in self.trees)

    def to(self, device: torch.device) -> Sequences:
        names = ("ids", "positions", "targets", "sources", "rows", "columns")
        return replace(self, **{name: to_device(getattr(self, name), device) for name in names})


@dataclass(frozen=True, slots=True)
class HostSequences:
    """`Sequences` in host memory, in one buffer: one copy brings all of them to a device."""

    buffer: Tensor  # int32: ids, positions, targets, sources, rows and columns, end to end
    tokens: int  # of which ids and positions have one number each
    trees: tuple[Tree, ...]
    leaves: tuple[int, ...]
    widest: int

    def pinned(self, device: torch.device) -> HostSequences:
        """The same, in memory from which `device` copies by itself."""
        return replace(self, buffer=pinned(self.buffer, device))

    def to(self, device: torch.device) -> Sequences:
        scored = (len(self.buffer) - 2 * self.tokens) // 4
        parts = to_device(self.buffer, device).long().split([self.tokens] * 2 + [scored] * 4)
        ids, positions, targets, sources, rows, columns = parts
        return Sequences(ids, positions, self.trees, self.leaves, targets, sources, rows, columns, self.widest)


@dataclass(frozen=True, slots=True)
class WholeModelInput:
    """One sequence for the unmodified transformers forward: passed in the place of `Sequences` through DDP, FSDP and the like."""

    ids: Tensor  # (tokens,) int64
