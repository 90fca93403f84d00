"""Which prompts a round samples for: each once before any comes again, and the held-out ones that every round is judged on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import numpy as np

from halos.data.files import Row as DataRow
from halos.data.formats import read_prompt
from halos.data.order import Order
from halos.data.sources import Source, open_source
from halos.errors import UserError
from halos.rollout.types import EVAL, TRAIN, Prompt, Turns
from halos.types import Demonstration


def read_prompts(entries: Sequence[str | Mapping[str, Any]], purpose: str) -> list[Prompt]:
    """The prompts of data entries, with what the data says of their answers. Rows of one prompt are one prompt.

    Raises UserError for rows without a prompt, and where two prompts share an id.
    """
    prompts: dict[str, Prompt] = {}
    for entry in entries:
        for record in open_source(Source.of(entry), Demonstration, purpose).rows():
            if record.left_out:
                continue
            prompt = _read(record, prompts)
            twin = prompts.setdefault(prompt.id, prompt)
            if twin.turns != prompt.turns:
                raise UserError(f"{record.where}: two prompts have the prompt_id {prompt.id!r}")
    return _once(list(prompts.values()))


def _once(prompts: list[Prompt]) -> list[Prompt]:
    """Without the later ones of those that ask the same: samples of one prompt are one group."""
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        seen.setdefault(repr(prompt.turns), prompt)
    return list(seen.values())


class Encodes(Protocol):
    """An Encoder of halos/data/tokenize.py, which imports transformers."""

    def prompts(self, prompts: Sequence[tuple[Turns, str]], /) -> Sequence[np.ndarray]: ...


def fitting(prompts: Sequence[Prompt], encoder: Encodes, room: float) -> list[Prompt]:
    """With their tokens, those that have at most `room` of them."""
    ids = encoder.prompts([(prompt.turns, prompt.id) for prompt in prompts])
    return [replace(prompt, ids=own) for prompt, own in zip(prompts, ids, strict=True) if len(own) <= room]


def digest(prompts: Sequence[Prompt]) -> str:
    """A hash of prompts in their order, with all that decides what is sampled of them and how that is scored."""
    kept = [prompt.to_row() for prompt in prompts]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _read(record: DataRow, taken: Collection[str]) -> Prompt:
    turns, solution = read_prompt(record)
    row, of_a_round = record.record, record.record.get("type") == "prompt"
    own: Mapping[str, Any] = row if of_a_round else {}  # only a prompts.jsonl says how many samples are wanted of each
    name = str(row["prompt_id"]) if row.get("prompt_id") is not None else _own_name(record.where, taken)
    samples = int(own["samples"]) if own.get("samples") is not None else None
    return Prompt(name, tuple(map(dict, turns)), own.get("split"), samples, own.get("temperature"),
                  {} if solution is None else {"solution": solution})  # fmt: skip


def _own_name(where: str, taken: Collection[str]) -> str:
    """`a.jsonl:3` without its directory, since what is drawn for a prompt depends on its name: a moved file gives the same."""
    name = where.rpartition("/")[2]
    return name if name not in taken else next(each for n in count(2) if (each := f"{name}~{n}") not in taken)


def for_round(prompts: Sequence[Prompt], number: int, *, count: int, samples: int, seed: int) -> list[Prompt]:
    """`count` prompts for round `number`: a pure function of the seed. None is used again before all others were."""
    rows = min(count, len(prompts))
    order, start = Order(np.zeros(len(prompts), np.int32), [1.0], 1, seed), number * rows
    chosen = [int(order.batch(place)[0]) for place in range(start, start + rows)]
    # where one pass ends and the next begins within a round, a prompt may come twice: it is one prompt
    return [replace(prompts[place], samples=samples, split=TRAIN) for place in dict.fromkeys(chosen)]


def held_out(prompts: Sequence[Prompt], *, count: int, seed: int) -> list[Prompt]:
    """The prompts that every round's policy answers, once each and greedily."""
    if not prompts or not count:
        return []
    order = Order(np.zeros(len(prompts), np.int32), [1.0], 1, seed)
    chosen = sorted(int(order.batch(place)[0]) for place in range(min(count, len(prompts))))
    return [replace(prompts[place], samples=1, temperature=0.0, split=EVAL) for place in chosen]
