"""Shuffled rows of each global batch: a pure function of (seed, epoch, batch), independent of earlier calls and of the number of
ranks, so that a resume at any step needs no state but the step."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from halos.errors import UserError

_EPOCH, _PARTNER, _MIXED, _PASS, _BLOCK = range(5)  # streams of one seed

ShareOut = Callable[[Sequence[int]], Sequence[int]]  # from the number of rows of each source to that of its draws in an epoch


def _stream(seed: int, *key: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))


def _permutation(stream: np.random.Philox, count: int) -> np.ndarray:
    # Raw bits are the same in every numpy; the result of Generator.permutation may change between releases.
    return np.argsort(stream.random_raw(count), kind="stable")


class Epochs:
    """An endless sequence of global batches: epochs of equal length, of which each draws so many rows from every source."""

    def __init__(self, sources: np.ndarray, per_epoch: Sequence[int], batch_size: int) -> None:
        self.sizes = [int(size) for size in np.bincount(sources, minlength=len(per_epoch))]  # rows of each source
        self.per_epoch = list(per_epoch)  # draws from each source
        self.rows_per_epoch = sum(per_epoch)
        if not self.rows_per_epoch:
            raise UserError("the weights of data.train leave no row in an epoch; increase them")
        self.batches_per_epoch = -(-self.rows_per_epoch // batch_size)
        self._sources, self._batch_size = sources, batch_size
        self._cached: tuple[int, np.ndarray] | None = None

    def batch(self, number: int) -> np.ndarray:
        """Return the rows of global batch `number`, counted from 0 over all epochs; the last one of an epoch may be smaller."""
        epoch, within = divmod(number, self.batches_per_epoch)
        return self.epoch(epoch)[within * self._batch_size : (within + 1) * self._batch_size]

    def epoch(self, number: int) -> np.ndarray:
        """Return all rows of an epoch, in order: (rows_per_epoch,)."""
        if self._cached is None or self._cached[0] != number:
            self._cached = number, self._drawn(number)
        return self._cached[1]

    def draws(self, batches: int) -> list[int]:
        """Return how many rows the first batches draw from each source."""
        epochs, rest = divmod(batches, self.batches_per_epoch)
        begun = self.epoch(epochs)[: rest * self._batch_size] if rest else np.zeros(0, np.int64)
        more = np.bincount(self._sources[begun], minlength=len(self.per_epoch))
        return [epochs * count + int(some) for count, some in zip(self.per_epoch, more, strict=True)]

    def _drawn(self, epoch: int) -> np.ndarray:
        raise NotImplementedError


class Order(Epochs):
    """Each epoch is shuffled anew. A source of n rows and weight w contributes round(w n) rows to an epoch, some of them
    repeatedly where w > 1."""

    def __init__(self, sources: np.ndarray, weights: Sequence[float], batch_size: int, seed: int) -> None:
        self._rows, self._seed = [np.flatnonzero(sources == number) for number in range(len(weights))], seed
        wanted = [round(weight * len(rows)) for weight, rows in zip(weights, self._rows, strict=True)]
        super().__init__(sources, wanted, batch_size)

    def _drawn(self, epoch: int) -> np.ndarray:
        stream = _stream(self._seed, _EPOCH, epoch)
        mixture = np.concatenate([_sample(rows, wanted, stream) for rows, wanted in zip(self._rows, self.per_epoch, strict=True)])
        return mixture[_permutation(stream, len(mixture))]


class Mixture(Epochs):
    """Each epoch has so many draws from every source, shuffled among each other.

    The draws from a source go on from epoch to epoch, through all its rows pass by pass, and each pass in another order: draw k,
    counted from 0 over all epochs, is row k mod n of pass k div n. So no row comes again before all others of its source came.
    """

    def __init__(self, sources: np.ndarray, share_out: ShareOut, batch_size: int, seed: int) -> None:
        self._rows, self._seed = [np.flatnonzero(sources == number) for number in range(int(sources.max()) + 1)], seed
        self._passes: dict[int, tuple[int, np.ndarray]] = {}  # the last pass of each source, by its number
        super().__init__(sources, share_out([len(rows) for rows in self._rows]), batch_size)

    def _drawn(self, epoch: int) -> np.ndarray:
        places = np.repeat(np.arange(len(self.per_epoch)), self.per_epoch)
        places = places[_permutation(_stream(self._seed, _MIXED, epoch), len(places))]
        drawn = np.empty(len(places), np.int64)
        for source, count in enumerate(self.per_epoch):
            drawn[places == source] = self._draws_from(source, epoch * count, (epoch + 1) * count)
        return drawn

    def _draws_from(self, source: int, first: int, end: int) -> np.ndarray:
        """Return the draws `first` to `end` from a source."""
        size = len(self._rows[source])
        passes = [self._pass(source, number) for number in range(first // size, -(-end // size))]
        start = first // size * size
        return np.concatenate(passes)[first - start : end - start]

    def _pass(self, source: int, number: int) -> np.ndarray:
        if self._passes.get(source, (-1,))[0] != number:
            rows = self._rows[source]
            self._passes[source] = number, rows[_permutation(_stream(self._seed, _PASS, source, number), len(rows))]
        return self._passes[source][1]


def block_order(seed: int, epoch: int, block: int, count: int) -> np.ndarray:
    """Return the order of the rows of a block of a stream in an epoch: (count,)."""
    return _permutation(_stream(seed, _BLOCK, epoch, block), count)


class GroupOrder:
    """Global batches of whole groups, as many in each as fit if all are as large as the largest."""

    def __init__(
        self, groups: np.ndarray, weights: Sequence[float], batch_size: int, seed: int,
        *, sources: np.ndarray | None = None, share_out: ShareOut | None = None,
    ) -> None:  # fmt: skip
        """`groups` (rows,) numbers each row's group. Raises UserError where one is larger than a batch. `share_out` mixes
        `sources` (rows,) by their groups."""
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
        self.largest = self._members[int(np.argmax([len(rows) for rows in self._members]))]  # the rows of the largest group
        self.mean_size = at_once * len(groups) / len(self._members)  # rows of a batch
        of_groups = np.zeros(len(starts), np.int64)
        if sources is not None and share_out is not None:
            of_groups = sources[order[starts]]
            _refuse_spread(sum(len({*sources[rows].tolist()}) > 1 for rows in self._members))
        self._groups: Epochs = (
            Order(of_groups, [1.0], at_once, seed) if share_out is None else Mixture(of_groups, share_out, at_once, seed)
        )
        self.batches_per_epoch = self._groups.batches_per_epoch
        self.sizes, self.per_epoch, self.draws = self._groups.sizes, self._groups.per_epoch, self._groups.draws  # of groups

    def batch(self, number: int) -> np.ndarray:
        return np.concatenate([self._members[group] for group in self._groups.batch(number)])


def _refuse_spread(count: int) -> None:
    if count:
        has = "1 prompt has" if count == 1 else f"{count} prompts have"
        raise UserError(
            f"data.train: {has} completions in several entries, and weight, count and epochs draw whole prompts from each: put"
            " the completions of a prompt into one entry, or leave them out"
        )


def _sample(rows: np.ndarray, wanted: int, stream: np.random.Philox) -> np.ndarray:
    """Return `wanted` rows: all of them as often as they fit, and a random choice for the remainder."""
    repeats, rest = divmod(wanted, len(rows)) if len(rows) else (0, 0)
    remainder = rows[_permutation(stream, len(rows))[:rest]] if rest else rows[:0]
    return np.concatenate([np.tile(rows, repeats), remainder])


def eval_batches(sources: np.ndarray, batch_size: int, groups: np.ndarray | None = None) -> list[np.ndarray]:
    """Return batches with every row once, in the order of the data. `sources` (rows,) numbers their sources: no batch has two.
    With `groups` (rows,) every group of a source is in one batch, which is larger than `batch_size` where the group is."""
    if groups is not None:
        parts = [np.flatnonzero(sources == number) for number in np.unique(sources)]
        return [batch for rows in parts for batch in _of_whole_groups(rows, groups[rows], batch_size)]
    cuts = [0, *(np.flatnonzero(np.diff(sources)) + 1).tolist(), len(sources)]
    return [np.arange(start, min(start + batch_size, end)) for first, end in pairwise(cuts)
            for start in range(first, end, batch_size)]  # fmt: skip


def _of_whole_groups(rows: np.ndarray, groups: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Return batches of as many whole groups as fit, in the order of each group's first row; a larger group is alone."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    order = np.argsort(first[inverse], kind="stable")
    batches = list[np.ndarray]()
    for members in np.split(rows[order], np.flatnonzero(np.diff(inverse[order])) + 1):
        if batches and len(batches[-1]) + len(members) <= batch_size:
            batches[-1] = np.concatenate([batches[-1], members])
        else:
            batches.append(members)
    return batches


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
