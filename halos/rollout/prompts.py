"""The prompts of a round: training prompts, none twice before all were used once, and the same evaluation prompts every round."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any, Protocol

import numpy as np

from halos.data.files import Row as DataRow
from halos.data.formats import read_prompt
from halos.data.order import Order
from halos.data.sources import Source, open_source
from halos.errors import UserError
from halos.rollout.types import EVAL, TRAIN, Prompt, Turns, seed_of
from halos.types import Demonstration


def read_prompts(entries: Sequence[str | Mapping[str, Any]], purpose: str, *, others: Collection[str] = ()) -> list[Prompt]:
    """The prompts of data entries, with their solutions where the data has them. Rows with the same prompt give one prompt.
    `others`: ids that none may have, such as those of training prompts, whose samples are in one file with evaluation's.

    Raises UserError for rows without a prompt, and for two prompts with one id.
    """
    prompts: dict[str, Prompt] = {}
    for entry in entries:
        for record in open_source(Source.of(entry), Demonstration, purpose).rows():
            if record.left_out:
                continue
            prompt = _read(record, prompts, others)
            first = prompts.setdefault(prompt.id, prompt)
            if first.turns != prompt.turns:
                raise UserError(f"{record.where}: two prompts have the prompt_id {prompt.id!r}")
    return _deduplicated(list(prompts.values()))


def _deduplicated(prompts: list[Prompt]) -> list[Prompt]:
    """The first of the prompts of a split with equal turns: samples of one prompt are one group."""
    unique: dict[tuple[str, str | None], Prompt] = {}
    for prompt in prompts:
        unique.setdefault((repr(prompt.turns), prompt.split), prompt)
    return list(unique.values())


class PromptEncoder(Protocol):
    """An Encoder of halos/data/tokenize.py, which imports transformers."""

    def prompts(self, prompts: Sequence[tuple[Turns, str]], /) -> Sequence[np.ndarray]: ...


def fitting(prompts: Sequence[Prompt], encoder: PromptEncoder, room: float) -> list[Prompt]:
    """Tokenize the prompts; return those with at most `room` tokens."""
    ids = encoder.prompts([(prompt.turns, prompt.id) for prompt in prompts])
    return [replace(prompt, ids=own) for prompt, own in zip(prompts, ids, strict=True) if len(own) <= room]


def digest(prompts: Sequence[Prompt]) -> str:
    """A hash of prompts in their order, with everything that influences their samples and the scores of these."""
    rows = [prompt.to_row() for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def _read(record: DataRow, taken: Collection[str], others: Collection[str]) -> Prompt:
    turns, solution = read_prompt(record)
    row, is_prompt_row = record.record, record.record.get("type") == "prompt"
    own: Mapping[str, Any] = row if is_prompt_row else {}  # only rows of a prompts.jsonl may set how they are sampled
    if row.get("prompt_id") is not None:
        name = _unused(str(row["prompt_id"]), others)
    else:  # `a.jsonl:3` without the directory: random numbers depend on the name, and must not change when a file moves
        name = _unused(record.where.rpartition("/")[2], taken, others)
    samples = int(own["samples"]) if own.get("samples") is not None else None
    return Prompt(name, tuple(map(dict, turns)), own.get("split"), samples, own.get("temperature"), own.get("seed"),
                  {} if solution is None else {"solution": solution})  # fmt: skip


def _unused(name: str, *taken: Collection[str]) -> str:
    names = chain([name], (f"{name}~{number}" for number in count(2)))
    return next(each for each in names if not any(each in some for some in taken))


def for_round(prompts: Sequence[Prompt], number: int, *, count: int, samples: int, seed: int) -> list[Prompt]:
    """`count` prompts for round `number`, a pure function of the seed. No prompt is used twice before all were used once."""
    rows = min(count, len(prompts))
    order, start = Order(np.zeros(len(prompts), np.int32), [1.0], 1, seed), number * rows
    chosen = [int(order.batch(position)[0]) for position in range(start, start + rows)]
    # where an epoch ends within the round, a prompt may be drawn twice: it is used once
    return [replace(prompts[index], samples=samples, split=TRAIN) for index in dict.fromkeys(chosen)]


def eval_prompts(
    prompts: Sequence[Prompt], *, count: int, seed: int, samples: int = 1, temperature: float = 0.0
) -> list[Prompt]:  # fmt: skip
    """The evaluation prompts, which every round's policy answers: greedily, or several times at a temperature with seeds of their
    own, the same in every round, so that two policies are compared on the same random numbers."""
    if not prompts or not count:
        return []
    order = Order(np.zeros(len(prompts), np.int32), [1.0], 1, seed)
    chosen = sorted(int(order.batch(position)[0]) for position in range(min(count, len(prompts))))
    own = seed_of(seed, EVAL, 0) if temperature else None  # no seed of training's: those are numbers, and this is a hash
    return [replace(prompts[index], samples=samples, temperature=temperature, seed=own, split=EVAL) for index in chosen]
