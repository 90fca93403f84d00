"""Which prompts a round samples for: each once before any comes again, and the held-out ones that every round is judged on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from halos.data.files import Row as DataRow
from halos.data.formats import read_prompt
from halos.data.order import Order
from halos.data.sources import Source, open_source
from halos.errors import UserError
from halos.rollout.types import EVAL, TRAIN, Row
from halos.types import Demonstration


def read_prompts(entries: Sequence[str | Mapping[str, Any]], purpose: str) -> list[Row]:
    """The prompts of data entries, with what the data says of their answers. Rows of one prompt are one prompt.

    Raises UserError for rows without a prompt, and where two prompts share an id.
    """
    found: dict[str, Row] = {}
    for entry in entries:
        for record in open_source(Source.of(entry), Demonstration, purpose).rows():
            row = _row(record, found)
            twin = found.setdefault(row["prompt_id"], row)
            if twin["prompt"] != row["prompt"]:
                raise UserError(f"{record.where}: two prompts have the prompt_id {row['prompt_id']!r}")
    return _once(list(found.values()))


def _once(rows: list[Row]) -> list[Row]:
    """Without the later ones of those that ask the same: samples of one prompt are one group."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(repr(row["prompt"]), row)
    return list(seen.values())


def digest(rows: Sequence[Row]) -> str:
    """A hash of prompts in their order, with all that decides what is sampled of them and how that is scored."""
    kept = [{name: value for name, value in row.items() if name != "ids"} for row in rows]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _row(record: DataRow, taken: Collection[str]) -> Row:
    prompt, solution = read_prompt(record)
    own = record.record.get("prompt_id")
    name = str(own) if own is not None else _own_name(record.where, taken)
    row: Row = {"type": "prompt", "prompt_id": name, "prompt": list(map(dict, prompt))}
    for name in ("samples", "temperature", "split"):  # of a prompts.jsonl that a round has written
        if record.record.get("type") == "prompt" and record.record.get(name) is not None:
            row[name] = record.record[name]
    return row if solution is None else {**row, "solution": solution}


def _own_name(where: str, taken: Collection[str]) -> str:
    """`a.jsonl:3` without its directory, since what is drawn for a prompt depends on its name: a moved file gives the same."""
    name = where.rpartition("/")[2]
    return name if name not in taken else next(each for n in count(2) if (each := f"{name}~{n}") not in taken)


def for_round(prompts: Sequence[Row], number: int, *, count: int, samples: int, seed: int) -> list[Row]:
    """`count` prompts for round `number`: a pure function of the seed. None is used again before all others were."""
    rows = min(count, len(prompts))
    order, start = Order(np.zeros(len(prompts), np.int32), [1.0], 1, seed), number * rows
    chosen = [int(order.batch(place)[0]) for place in range(start, start + rows)]
    # where one pass ends and the next begins within a round, a prompt may come twice: it is one prompt
    return [{**prompts[place], "samples": samples, "split": TRAIN} for place in dict.fromkeys(chosen)]


def held_out(prompts: Sequence[Row], *, count: int, seed: int) -> list[Row]:
    """The prompts that every round's policy answers, once each and greedily."""
    if not prompts or not count:
        return []
    order = Order(np.zeros(len(prompts), np.int32), [1.0], 1, seed)
    chosen = sorted(int(order.batch(place)[0]) for place in range(min(count, len(prompts))))
    return [{**prompts[place], "samples": 1, "temperature": 0.0, "split": EVAL} for place in chosen]
