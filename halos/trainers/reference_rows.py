"""The rows that a loss needs the reference's log-probs of, and how a pass over them is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from halos.config.plugins import code_hash
from halos.config.schema import Train
from halos.data.collate import mismatched_row
from halos.data.dataset import Dataset
from halos.examples import PackRow, row_hash
from halos.trainers.logps_table import HASH

if TYPE_CHECKING:
    from halos.trainers.microbatches import Split
    from halos.trainers.objective import Objective

BUDGETS = 4  # micro-batches of training in one of a pass without gradients, which keeps no activations
MOST = 65_536  # tokens, above which a GPU is no faster
PART = 65_536  # tokens, after which a part is written: seconds on a GPU, a minute on a CPU


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of a dataset's items."""

    name: str
    items: np.ndarray  # (items,) which of the dataset, ascending
    of: int  # items of the dataset
    rows_of: Callable[[int], Sequence[PackRow]]  # the rows of an item
    facts: Mapping[str, Any]  # what the rows depend on


@dataclass(frozen=True, slots=True)
class Plan:
    """The distinct rows of a source, cut into batches and these into parts: a function of the rows, for any number of ranks."""

    hashes: np.ndarray  # (rows,) S16
    places: np.ndarray  # (rows, 2): the item, and which of its rows
    tokens: np.ndarray  # (rows,)
    parts: list[list[np.ndarray]]  # of each part its batches: indices of rows

    @classmethod
    def of(cls, source: Source, settings: Train, budget: int | None, *, is_checkpointed: bool) -> Plan:
        """`settings` and `budget`, in tokens, bound a micro-batch of training; `is_checkpointed`: with few activations."""
        hashes, places, tokens = dict[bytes, None](), list[tuple[int, int]](), list[int]()
        for item in source.items.tolist():
            for number, row in enumerate(source.rows_of(item)):
                if (key := row_hash(row)) not in hashes:
                    hashes[key] = None
                    places.append((item, number))
                    tokens.append(len(row[0]) + len(row[1].ids))
        rows_of_item = 1 + max((number for _, number in places), default=0)
        batches = cut(tokens, *bounds(settings, budget, rows_of_item, is_checkpointed=is_checkpointed))
        sizes = [sum(tokens[n] for n in batch) for batch in batches]
        parts = [[batches[n] for n in part] for part in cut(sizes, PART, None)]
        return cls(np.array(list(hashes), HASH), np.array(places, np.int64).reshape(-1, 2), np.array(tokens, np.int64), parts)


def bounds(settings: Train, budget: int | None, rows_of_item: int, *, is_checkpointed: bool) -> tuple[int | None, int | None]:
    """Return how many tokens and rows a batch of the pass holds; as to `settings` and `budget` see Plan.of."""
    most, times = settings.microbatch_size, 1 if is_checkpointed else BUDGETS
    return budget and max(budget, min(times * budget, MOST)), most and times * most * rows_of_item


def cut(sizes: Sequence[int], budget: int | None, most: int | None) -> list[np.ndarray]:
    """Cut consecutive things into runs, each of up to `budget` in total and `most` in number; one that is larger is alone."""
    starts, total = [0], 0
    for n, size in enumerate(sizes):
        if n > starts[-1] and ((budget and total + size > budget) or (most and n - starts[-1] >= most)):
            starts.append(n)
            total = 0
        total += size
    return [np.arange(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)] if sizes else []


def sources(trainer: Objective, splits: Mapping[str, Split], visited: np.ndarray | None) -> Iterator[Source]:
    """The rows of every split, and those with mismatched completions where the loss needs them.

    `visited` are the items of "train" to read, ascending; None: all."""
    kinds = [f"{each.__module__}.{each.__qualname__}" for each in (trainer.loss.inputs, type(trainer))]
    kinds += [str(code_hash(kind)) for kind in kinds]  # of those of the user's own
    for name, split in splits.items():
        if not isinstance(split.rows, Dataset):
            continue
        some = visited if name == "train" else None
        items, data = (np.arange(len(split.rows)) if some is None else some), {"data": split.rows.content}
        data |= {"items": hashlib.sha256(some.astype(np.int64).tobytes()).hexdigest()} if some is not None else {}
        yield Source(name, items, len(split.rows), partial(_own, trainer, split.rows), {**data, "rows": kinds})
        if isinstance(partners := split.mismatched_partners, np.ndarray):
            longest, digest = trainer.run.max_length, hashlib.sha256(partners.astype(np.int64).tobytes()).hexdigest()
            facts = {**data, "partners": digest, "longest": longest}
            rows_of = partial(_mismatched, split.rows, partners, longest)
            yield Source(f"{name}, mismatched", items, len(split.rows), rows_of, facts)


def _own(trainer: Objective, rows: Dataset, n: int) -> Sequence[PackRow]:
    return trainer.rows([rows[n]])


def _mismatched(rows: Dataset, partners: np.ndarray, longest: int, n: int) -> Sequence[PackRow]:
    return [mismatched_row(rows[n], rows[int(partners[n])], longest)]
