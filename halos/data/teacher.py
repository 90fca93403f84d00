"""Columns of a row with what a teacher says: of every scored token its likeliest ids and their log-probs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from halos.data.encoded import Encoded
from halos.errors import UserError
from halos.examples import Demonstration, Example, PackRow, TeacherLogps, row_hash

IDS, LOGPS, TOKEN_LOGPS = "teacher_ids", "teacher_logps", "teacher_token_logps"  # the last: of the row's own tokens
VOCABULARY, ROW = "teacher_vocabulary", "teacher_row"  # hashes: of the tokenizer, and of the tokens that the teacher has read
TEMPERATURE = "teacher_temperature"  # by which the teacher's logits were divided
MOST = 1.01  # of the sum of probabilities: those of a teacher in half precision are rounded


def parse_columns(columns: Mapping[str, Any], where: str) -> TeacherLogps | None:
    """Parse a row's teacher columns; None where it has none. Raises UserError for what are no log-probs of distinct ids."""
    if not {IDS, LOGPS} & columns.keys():
        return None
    if missing := [name for name in (IDS, LOGPS) if name not in columns]:
        raise UserError(f"{where}: {IDS} and {LOGPS} belong together, and {missing[0]} is missing")
    ids, logps = columns[IDS], columns[LOGPS]
    for name, lists in ((IDS, ids), (LOGPS, logps)):
        if not (_is_list(lists) and all(map(_is_list, lists))):
            raise UserError(f"{where}: {name} is {str(lists)[:60]}, not a list, of every scored token, of lists of numbers")
    if len(ids) != len(logps):
        raise UserError(f"{where}: {IDS} has {len(ids)} lists, and {LOGPS} {len(logps)}: one for every scored token")
    width = max(map(len, ids), default=0)
    table = np.full((len(ids), 1 + 2 * width), -np.inf, np.float32)
    table[:, 0], table[:, 1 + width :] = np.nan, 0
    for number, (some, their) in enumerate(zip(ids, logps, strict=True)):
        _check(some, their, f"{where}: the list {number + 1} of")
        table[number, 1 : 1 + len(some)], table[number, 1 + width : 1 + width + len(some)] = their, some
    if (known := columns.get(TOKEN_LOGPS)) is not None:
        if not _is_list(known) or len(known) != len(ids) or not all(_is_logp(each) for each in known):
            raise UserError(f"{where}: {TOKEN_LOGPS} is no list of a log-prob for each of the {len(ids)} tokens of {IDS}")
        table[:, 0] = known
    if (temperature := columns.get(TEMPERATURE)) is not None and not (_is_number(temperature) and 0 < temperature < np.inf):
        raise UserError(f"{where}: {TEMPERATURE} is {temperature!r}, not a number above 0")
    return TeacherLogps(table, columns.get(VOCABULARY), columns.get(ROW), temperature)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_logp(value: Any) -> bool:
    return _is_number(value) and -np.inf < float(value) <= 0


def _check(ids: Sequence[Any], logps: Sequence[Any], of: str) -> None:
    if not ids:
        raise UserError(f"{of} {IDS} is empty: a teacher says at least one id of every scored token")
    if wrong := [each for each in ids if type(each) is not int or each < 0]:
        raise UserError(f"{of} {IDS} has {wrong[0]!r}, which is no token id")
    if len(set(ids)) < len(ids):
        raise UserError(f"{of} {IDS} has an id twice")
    if len(ids) != len(logps):
        raise UserError(f"{of} {IDS} has {len(ids)} ids, and that of {LOGPS} {len(logps)} log-probs")
    if wrong := [each for each in logps if not _is_logp(each)]:
        raise UserError(f"{of} {LOGPS} has {wrong[0]!r}, which is no log-prob: a finite number of at most 0")
    if (total := float(np.exp(np.array(logps, np.float64)).sum())) > MOST:
        raise UserError(f"{of} {LOGPS} has probabilities that sum to {total:.4g}, more than 1: it takes natural logarithms")


def with_teacher(encoded: Encoded | str, example: Example, where: str, **known: Any) -> Encoded | str:
    """Add what a teacher says of the scored tokens, where the row has it. Raises as `fitted`, which gets `known`."""
    if not isinstance(example, Demonstration) or example.teacher_logps is None or isinstance(encoded, str):
        return encoded
    row = (encoded.prompt, encoded.completions[0])
    return replace(encoded, teacher_logps=fitted(example.teacher_logps, row, **known, where=where))


def fitted(
    given: TeacherLogps, row: PackRow, *, vocabulary: str, num_ids: int, temperature: float | None, where: str
) -> np.ndarray:
    """Return what a teacher says of the scored tokens of an encoded completion: (scored, 1 + 2 k) float32.

    Raises UserError where it has read other tokens, ids are not of the tokenizer with this `vocabulary` and `num_ids`, or its
    temperature is not that of training; None: nothing is learned of it.
    """
    scored, width = int(row[1].scored.sum()), given.table.shape[1] // 2
    if given.vocabulary is not None and given.vocabulary != vocabulary:
        raise UserError(
            f"{where}: {VOCABULARY} is {given.vocabulary}, and the policy's tokenizer has {vocabulary}: the ids mean other tokens"
        )
    if None not in (given.temperature, temperature) and given.temperature != temperature:
        raise UserError(
            f"{where}: {TEMPERATURE} is {given.temperature:g}, and train.temperature={temperature:g}: the teacher's"
            f" log-probs are of another distribution; train.temperature={given.temperature:g} is theirs"
        )
    if len(given.table) != scored:
        raise UserError(
            f"{where}: {IDS} has {len(given.table)} lists, and {scored} tokens are scored by this tokenizer and chat template,"
            " the end token included: the teacher has read another text"
        )
    if given.row is not None and given.row != row_hash(row).hex():
        raise UserError(f"{where}: {ROW} is the hash of other tokens than this tokenizer and chat template make of the row")
    if (largest := int(given.table[:, 1 + width :].max(initial=0))) >= num_ids:
        raise UserError(f"{where}: {IDS} has the id {largest}, and the tokenizer {num_ids} ids")
    return given.table


def likeliest(table: np.ndarray, top_k: int) -> np.ndarray:
    """From (scored, 1 + 2 k) to (scored, 1 + 2 top_k): the likeliest ids first; where there are fewer, log-probs of -inf."""
    width = table.shape[1] // 2
    logps, ids = table[:, 1 : 1 + width], table[:, 1 + width :]
    order = np.argsort(-logps, axis=1, kind="stable")[:, :top_k]
    logps, ids = (np.take_along_axis(part, order, 1) for part in (logps, ids))
    missing = ((0, 0), (0, top_k - logps.shape[1]))
    logps, ids = np.pad(logps, missing, constant_values=-np.inf), np.pad(ids, missing)
    return np.concatenate([table[:, :1], logps, ids], 1).astype(np.float32)
