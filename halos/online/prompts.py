"""Which prompts a round samples for: each once before any comes again, and the held-out ones that every round is judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from halos.data.files import Row as DataRow
from halos.data.formats import read_prompt
from halos.data.order import Order
from halos.data.sources import Source, open_source
from halos.errors import UserError
from halos.online.records import EVAL, TRAIN, Row
from halos.types import Demonstration


def read_prompts(entries: Sequence[str | Mapping[str, Any]], purpose: str) -> list[Row]:
    """The prompts of data entries, with what the data says of their answers. Rows of one prompt are one prompt.

    Raises UserError for rows without a prompt, and where two prompts share an id.
    """
    found: dict[str, Row] = {}
    for entry in entries:
        for record in open_source(Source.of(entry), Demonstration, purpose).rows():
            row = _row(record)
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


def _row(record: DataRow) -> Row:
    prompt, solution = read_prompt(record)
    own = record.record.get("prompt_id")
    row: Row = {"type": "prompt", "prompt_id": str(own) if own is not None else record.where, "prompt": list(map(dict, prompt))}
    for name in ("samples", "temperature", "split"):  # of a prompts.jsonl that a round has written
        if record.record.get("type") == "prompt" and record.record.get(name) is not None:
            row[name] = record.record[name]
    return row if solution is None else {**row, "solution": solution}


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
