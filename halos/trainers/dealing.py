"""Deals the items of a global batch to ranks: a pure function of lengths and prompts, which every rank computes for all.

Completions of one prompt go to one rank where that keeps the balance, so that the prompt is computed once.
"""

from itertools import pairwise

import numpy as np

SLACK = 1 / 16  # a rank may compute that much more than the least possible of the longest if no prompt is split for it


def by_turns(count: int, world: int) -> list[np.ndarray]:
    """Positions in the batch for each rank: every `world`-th item."""
    return [np.arange(rank, count, world) for rank in range(world)]


def together(own: np.ndarray, prompts: np.ndarray, groups: np.ndarray, world: int) -> list[np.ndarray]:
    """Positions in the batch for each rank: the items in the order of their prompts' first ones, cut into `world` parts.

    All three are (items,): the tokens that an item alone needs, those of a prompt that it may share, and its prompt's number.
    """
    _, first, number = np.unique(groups, return_index=True, return_inverse=True)
    shared = np.zeros(len(first), np.int64)
    np.maximum.at(shared, number, prompts)
    order = np.argsort(first[number], kind="stable")
    parts = _Parts(own[order], shared[number][order], groups[order])
    return [order[start:end] for start, end in pairwise(parts.cuts(world))]


class _Parts:
    """Consecutive items, siblings side by side; a part's cost is its tokens, each of its prompts counted once."""

    def __init__(self, own: np.ndarray, prompts: np.ndarray, groups: np.ndarray) -> None:
        self.count = len(own)
        self.begins = np.append(np.diff(groups, prepend=groups[0] - 1) != 0, True)  # (items + 1,) an item is its prompt's first
        self.before = np.concatenate([[0], np.cumsum(own + prompts * self.begins[:-1])])  # (items + 1,) tokens
        self.again = np.append(np.where(self.begins[:-1], 0, prompts), 0)  # (items + 1,) tokens of a prompt that was split

    def cuts(self, world: int) -> list[int]:
        """Where each part begins, and where the last one ends."""
        least = self._least(world)
        most, cuts = int(least * (1 + SLACK)), [0]
        for left in range(world - 1, -1, -1):
            start = cuts[-1]
            end = self._end(start, least if self._fits(start, least, left + 1) else most)
            if not self.begins[end]:
                end = self._whole(start, end, most, left)
            cuts.append(end)
        return cuts

    def _whole(self, start: int, end: int, most: int, left: int) -> int:
        """The end of a part that splits no prompt, if there is one with which no part costs more than `most`; else `end`."""
        group_end = end + int(np.argmax(self.begins[end:]))
        if self._cost(start, group_end) <= most:
            return group_end
        group_start = end - int(np.argmax(self.begins[end::-1]))
        return group_start if group_start > start and self._fits(group_start, most, left) else end

    def _cost(self, start: int, end: int) -> int:
        return int(self.before[end] - self.before[start] + self.again[start])

    def _end(self, start: int, most: int) -> int:
        """The end of the longest part from `start` that costs at most `most`; an item that costs more is a part."""
        if start >= self.count:
            return self.count
        last = int(self.before.searchsorted(self.before[start] + most - self.again[start], "right")) - 1
        return max(last, start + 1)

    def _fits(self, start: int, most: int, world: int) -> bool:
        """Whether `world` parts that cost at most `most` hold all items from `start`."""
        for _ in range(world):
            start = self._end(start, most)
        return start >= self.count

    def _least(self, world: int) -> int:
        """The least that the most expensive of `world` parts can cost."""
        low, high = int((self.before[1:] - self.before[:-1] + self.again[:-1]).max()), self._cost(0, self.count)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(0, middle, world) else (middle + 1, high)
        return high
