"""Shuffled rows of each global batch: a pure function of (seed, epoch, batch), independent of earlier calls."""

from collections.abc import Sequence

import numpy as np

from halos.errors import UserError

_EPOCH, _PARTNER = 0, 1  # streams of one seed


def _stream(seed: int, *key: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))


def _permutation(stream: np.random.Philox, count: int) -> np.ndarray:
    # Raw bits are the same in every numpy; the result of Generator.permutation may change between releases.
    return np.argsort(stream.random_raw(count), kind="stable")


class Order:
    """An endless sequence of global batches, shuffled anew in every epoch. A source of n rows and weight w
    contributes round(w n) rows to an epoch, some of them repeatedly where w > 1."""

    def __init__(self, sources: np.ndarray, weights: Sequence[float], batch_size: int, seed: int) -> None:
        self._rows = [np.flatnonzero(sources == number) for number in range(len(weights))]
        self._wanted = [round(weight * len(rows)) for weight, rows in zip(weights, self._rows, strict=True)]
        self.rows_per_epoch = sum(self._wanted)
        if not self.rows_per_epoch:
            raise UserError("the weights of data.train leave no row in an epoch; increase them")
        self.batches_per_epoch = -(-self.rows_per_epoch // batch_size)
        self._batch_size, self._seed = batch_size, seed
        self._cached: tuple[int, np.ndarray] | None = None

    def batch(self, number: int) -> np.ndarray:
        """Return the rows of global batch `number`, counted from 0 over all epochs; the last one of an epoch may be smaller."""
        epoch, within = divmod(number, self.batches_per_epoch)
        return self.epoch(epoch)[within * self._batch_size : (within + 1) * self._batch_size]

    def epoch(self, number: int) -> np.ndarray:
        """Return all rows of an epoch, in order: (rows_per_epoch,)."""
        if self._cached is None or self._cached[0] != number:
            stream = _stream(self._seed, _EPOCH, number)
            mixture = np.concatenate(
                [_sample(rows, wanted, stream) for rows, wanted in zip(self._rows, self._wanted, strict=True)]
            )
            self._cached = number, mixture[_permutation(stream, len(mixture))]
        return self._cached[1]


class GroupOrder:
    """Global batches of whole groups, as many in each as fit if all are as large as the largest."""

    def __init__(self, groups: np.ndarray, weights: Sequence[float], batch_size: int, seed: int) -> None:
        """`groups` (rows,) numbers each row's group. Raises UserError where one is larger than a batch."""
        if any(weight != 1 for weight in weights):
            raise UserError("data.train: weights other than 1 would split groups of samples; leave them out")
        order = np.argsort(groups, kind="stable")
        _, starts = np.unique(groups[order], return_index=True)
        self._members = np.split(order, starts[1:])  # rows of each group
        largest = max(map(len, self._members))
        if largest > batch_size:
            raise UserError(
                f"train.batch_size={batch_size} completions cannot hold a whole group: one prompt has {largest}; give"
                f" train.batch_size={largest} or more"
            )
        at_once = batch_size // largest
        self._groups = Order(np.zeros(len(self._members), np.int32), [1.0], at_once, seed)
        self.batches_per_epoch = self._groups.batches_per_epoch

    def batch(self, number: int) -> np.ndarray:
        return np.concatenate([self._members[group] for group in self._groups.batch(number)])


def _sample(rows: np.ndarray, wanted: int, stream: np.random.Philox) -> np.ndarray:
    """Return `wanted` rows: all of them as often as they fit, and a random choice for the remainder."""
    repeats, rest = divmod(wanted, len(rows)) if len(rows) else (0, 0)
    remainder = rows[_permutation(stream, len(rows))[:rest]] if rest else rows[:0]
    return np.concatenate([np.tile(rows, repeats), remainder])


def eval_batches(count: int, batch_size: int) -> list[np.ndarray]:
    """Return batches with every row once, in the order of the data."""
    return [np.arange(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def mismatched_partners(groups: np.ndarray, seed: int, *, what: str) -> np.ndarray:
    """Return for each row another one, uniform among those with a different prompt: (N,). KTO's mismatched completions.

    Raises UserError where all rows have the same prompt; `what` names the loss and the data in its message.
    """
    count = len(groups)
    order = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    if len(starts) < 2:
        raise UserError(f"{what} pairs each prompt with a completion of another, and all {count} rows have the same prompt")
    others = np.repeat(count - sizes, sizes).astype(np.uint64)
    steps = (_stream(seed, _PARTNER).random_raw(count) % others).astype(np.int64)
    after = np.repeat(starts + sizes, sizes)  # sorted by prompt, the rows of other prompts follow a group, cyclically
    partners = np.empty(count, np.int64)
    partners[order] = order[(after + steps) % count]
    return partners
