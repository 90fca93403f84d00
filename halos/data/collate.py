"""Pack sequences of token ids end to end into a model input."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from halos.examples import Completion, Item, PackRow
from halos.types import Sequences


def pack(rows: Sequence[PackRow]) -> Sequences:
    """Pack one sequence per row, in order. A scored first token has no context to be predicted from, and is left out."""
    assert rows
    lengths = np.array([len(prompt) + len(completion.ids) for prompt, completion in rows], np.int64)
    starts = np.cumsum(lengths) - lengths
    ids = np.concatenate([part for prompt, completion in rows for part in (prompt, completion.ids)]).astype(np.int64)
    masks = [part for prompt, completion in rows for part in (np.zeros(len(prompt), bool), completion.scored)]
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    targets = np.flatnonzero(np.concatenate(masks) & (positions > 0))
    row_of = np.repeat(np.arange(len(rows)), lengths)[targets]
    counts = np.bincount(row_of, minlength=len(rows))
    columns = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Sequences(
        ids=_tensor(ids),
        positions=_tensor(positions),
        lengths=tuple(lengths.tolist()),
        targets=_tensor(ids[targets]),
        sources=_tensor(targets - 1),
        rows=_tensor(row_of),
        columns=_tensor(columns),
        widest=max(1, int(counts.max())),  # rows of which nothing is learned may be alone
    )


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))


def mismatched_row(item: Item, partner: Item, max_length: int) -> PackRow:
    """Join the prompt of one row and the completion of another, truncated to `max_length`."""
    completion, max_tokens = partner.completions[0], max_length - len(item.prompt)
    return item.prompt, Completion(completion.ids[:max_tokens], completion.scored[:max_tokens])


def num_truncated_mismatches(prompt_lengths: np.ndarray, lengths: np.ndarray, partners: np.ndarray, max_length: int) -> int:
    """Count the rows that `mismatched_row` truncates. All three are (N,); `lengths` counts prompt and completion."""
    completions = (lengths - prompt_lengths)[partners]
    return int((prompt_lengths + completions > max_length).sum())
