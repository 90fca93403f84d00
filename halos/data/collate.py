"""Pack sequences of token ids end to end into a model input; prompts that sequences share are stored once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from halos.examples import Completion, Item, PackRow
from halos.types import HostSequences, Sequences, Tree

# A branch's attention takes a mask, and computes what causal attention leaves out: about 2 h n^2 FLOPs a layer for n tokens of h
# dimensions, where a prompt of p tokens saves 24 h^2 p. This is 12 h of a small model.
PAYS = 4096


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive tokens of one sequence, or of a trunk."""

    row: int  # the sequence; of a trunk any of its sequences
    ids: np.ndarray
    scored: np.ndarray
    position: int  # of its first token in the sequence
    before: int  # where in the packed tokens the token before its first one is


def pack(rows: Sequence[PackRow], *, share: bool = False) -> Sequences:
    """`pack_on_host`, for a model on the CPU."""
    return pack_on_host(rows, share=share).to(torch.device("cpu"))


def pack_on_host(rows: Sequence[PackRow], *, share: bool = False) -> HostSequences:
    """Pack sequences; with `share` those that have a prompt in common form a tree, in the order of their first rows.

    A scored first token has no context to be predicted from, and is left out.
    """
    assert rows
    groups = _by_prompt(rows) if share else [[number] for number in range(len(rows))]
    trees, leaves = tuple(_tree(rows, group) for group in groups), [number for group in groups for number in group]
    pieces = list(_pieces(rows, groups))
    sizes = np.array([len(piece.ids) for piece in pieces], np.int64)
    starts = np.cumsum(sizes) - sizes
    ids = np.concatenate([piece.ids for piece in pieces])
    positions = np.arange(len(ids)) + np.repeat([piece.position for piece in pieces] - starts, sizes)
    targets = np.flatnonzero(np.concatenate([piece.scored for piece in pieces]) & (positions > 0))
    piece_of = np.repeat(np.arange(len(pieces)), sizes)[targets]
    is_first = targets == starts[piece_of]
    sources = np.where(is_first, np.array([piece.before for piece in pieces])[piece_of], targets - 1)
    row_of = np.array([piece.row for piece in pieces])[piece_of]
    counts = np.bincount(row_of, minlength=len(rows))
    in_order = counts[leaves]  # targets follow the order of the leaves
    columns = np.arange(len(targets)) - np.repeat(np.cumsum(in_order) - in_order, in_order)
    buffer = np.concatenate([ids, positions, ids[targets], sources, row_of, columns], dtype=np.int32, casting="unsafe")
    widest = max(1, int(counts.max()))  # rows of which nothing is learned may be alone
    return HostSequences(torch.from_numpy(buffer), len(ids), trees, tuple(leaves), widest)


def is_branch(prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
    """Whether sequences of prompts and completions of these lengths are stored as branches, beside others of the same prompt."""
    return (prompt > 0) & (completion.astype(np.int64) ** 2 <= PAYS * prompt.astype(np.int64))


def _by_prompt(rows: Sequence[PackRow]) -> list[list[int]]:
    """The numbers of the rows that have a prompt in common; a row is alone whose prompt is too short to be worth it."""
    groups = dict[bytes | int, list[int]]()
    lengths = np.array([(len(prompt), len(completion.ids)) for prompt, completion in rows], np.int64)
    for number, shares in enumerate(is_branch(*lengths.T).tolist()):
        groups.setdefault(np.asarray(rows[number][0], np.int64).tobytes() if shares else number, []).append(number)
    return list(groups.values())


def _tree(rows: Sequence[PackRow], group: Sequence[int]) -> Tree:
    trunk, branches = len(rows[group[0]][0]), [len(rows[number][1].ids) for number in group]
    return (trunk, *branches) if len(group) > 1 else (trunk + branches[0],)


def _pieces(rows: Sequence[PackRow], groups: Sequence[Sequence[int]]) -> Iterator[_Piece]:
    """Every group's prompt, then the completions of its rows."""
    end = 0
    for group in groups:
        prompt = rows[group[0]][0]
        yield _Piece(group[0], prompt, np.zeros(len(prompt), bool), position=0, before=-1)
        end += len(prompt)
        trunk = end
        for number in group:
            completion = rows[number][1]
            yield _Piece(number, completion.ids, completion.scored, position=len(prompt), before=trunk - 1)
            end += len(completion.ids)


def mismatched_row(item: Item, partner: Item, max_length: int) -> PackRow:
    """Join the prompt of one row and the completion of another, truncated to `max_length`."""
    completion, max_tokens = partner.completions[0], max_length - len(item.prompt)
    return item.prompt, Completion(completion.ids[:max_tokens], completion.scored[:max_tokens])


def num_truncated_mismatches(prompt_lengths: np.ndarray, lengths: np.ndarray, partners: np.ndarray, max_length: int) -> int:
    """Count the rows that `mismatched_row` truncates. All three are (N,); `lengths` counts prompt and completion."""
    completions = (lengths - prompt_lengths)[partners]
    return int((prompt_lengths + completions > max_length).sum())
