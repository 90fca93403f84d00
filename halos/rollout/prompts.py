"""The prompts of a round: training prompts, none twice before all were used once, and the same evaluation prompts every round."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any, Protocol

import numpy as np

from halos.config.rollout_modules import scorer_class
from halos.data.files import Row as DataRow
from halos.data.formats import read_prompt
from halos.data.order import Order
from halos.data.row import LEFT_OUT, depth_limited
from halos.data.sources import Source, open_source
from halos.errors import UserError
from halos.rollout.rows import DATA, Row, as_json
from halos.rollout.types import EVAL, TRAIN, Prompt, Turns, seed_of
from halos.types import Demonstration

log = logging.getLogger(__name__)

_OF_PROMPT = ("type", "prompt_id", "prompt", "samples", "temperature", "seed", "split")  # keys of a prompt in a row


def read_prompts(
    entries: Sequence[str | Mapping[str, Any]], purpose: str, *, others: Collection[str] = (), unused: Counter[str] | None = None
) -> list[Prompt]:  # fmt: skip
    """The prompts of data entries, each with its row of the data. Rows with the same prompt give one prompt, that of the first,
    since samples of one prompt are one group; those whose other columns differ are counted in a warning.
    `others`: ids that none may have, such as those of training prompts, whose samples are in one file with evaluation's.
    `unused` counts the rows that give no prompt, by why.

    Raises UserError for rows without a prompt, and for two prompts with one id.
    """
    by_id: dict[str, tuple[Prompt, str]] = {}
    unique: dict[tuple[str, str | None], tuple[Prompt, str]] = {}
    repeats, unused = list[tuple[str, str, list[str]]](), Counter() if unused is None else unused
    for entry in entries:
        for record in open_source(Source.of(entry), Demonstration, purpose).rows():
            if record.left_out:
                unused[f"of data.{purpose} {record.note or LEFT_OUT}"] += 1
                continue
            with depth_limited(record.where):
                prompt = _read(record, by_id, others)
            first = by_id.setdefault(prompt.id, (prompt, record.where))
            if first[0].turns != prompt.turns:
                raise UserError(f"{record.where}: two prompts have the prompt_id {prompt.id!r}")
            if first[0] is prompt:
                first = unique.setdefault((repr(prompt.turns), prompt.split), first)
            unused[f"of data.{purpose} with the prompt of an earlier row"] += first[0] is not prompt
            if first[0] is not prompt and (differing := _differing(first[0], prompt)):
                repeats.append((record.where, first[1], differing))
    if repeats:
        where, first_where, _ = repeats[0]
        columns = dict.fromkeys(name for _, _, names in repeats for name in names)
        log.warning(
            "data.%s: %d of its rows have the prompt of an earlier row and another %s (%s after %s): the first row of each prompt"
            " is used, and reward functions get its columns", purpose, len(repeats), ", ".join(columns), where, first_where,
        )  # fmt: skip
    return [prompt for prompt, _ in unique.values()]


def unused_rows(unused: Mapping[str, int]) -> str:
    """What `read_prompts` counted, for the end of a line: `; 8 rows of data.train filtered out by level>0`."""
    return "".join(f"; {count} {'row' if count == 1 else 'rows'} {why}" for why, count in unused.items() if count)


def _differing(one: Prompt, other: Prompt) -> list[str]:
    """The columns in which two rows of one prompt differ."""
    names = dict.fromkeys([*one.data, *other.data, *one.columns])
    same = {"prompt_id"}
    return [name for name in names if name not in same and (one.data.get(name), one.columns.get(name))
            != (other.data.get(name), other.columns.get(name))]  # fmt: skip


class PromptEncoder(Protocol):
    """An Encoder of halos/data/tokenize.py, which imports transformers."""

    def prompts(self, prompts: Sequence[tuple[Turns, str]], /) -> Sequence[np.ndarray]: ...


def room_for_prompts(max_new_tokens: int | None, max_length: float) -> float:
    """How many tokens a prompt may have: the answer takes `max_new_tokens` of all, or, where that is None, at least one."""
    return max_length - (1 if max_new_tokens is None else max_new_tokens)


def answer(max_new_tokens: int | None, key: str = "online.sampler.max_new_tokens=") -> str:
    """What a prompt leaves room for, in messages; `key` is written before the number."""
    return "an answer" if max_new_tokens is None else f"{key}{max_new_tokens}"


def fitting(prompts: Sequence[Prompt], encoder: PromptEncoder, room: float) -> list[Prompt]:
    """Tokenize the prompts; return those with at most `room` tokens."""
    ids = encoder.prompts([(prompt.turns, prompt.id) for prompt in prompts])
    return [replace(prompt, ids=own) for prompt, own in zip(prompts, ids, strict=True) if len(own) <= room]


def content_hashes(train: Sequence[Prompt], evaluation: Sequence[Prompt], scorer: str) -> dict[str, str | None]:
    """Hashes of prompts, by the keys under which a resume compares them; those of columns only where the scorer reads any."""
    hashes: dict[str, str | None] = {}
    for key, prompts in (("data.train", train), ("data.eval", evaluation)):
        hashes[key] = digest(prompts) if prompts else None
        hashes[f"{key}.columns"] = columns_digest(prompts) if prompts and scorer_class(scorer).reads_columns else None
    return hashes


def digest(prompts: Sequence[Prompt]) -> str:
    """A hash of prompts in their order, with everything that influences their samples, and with their solutions: as versions
    recorded it that knew no other columns of the data, which have a hash of their own."""
    rows = [replace(prompt, data={}).to_row() for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def columns_digest(prompts: Sequence[Prompt]) -> str:
    """A hash of the data of prompts in their order."""
    total = hashlib.sha256()
    for prompt in prompts:
        total.update(json.dumps(dict(prompt.data), sort_keys=True).encode() + b"\n")
    return total.hexdigest()


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
                  {} if solution is None else {"solution": solution}, _data_of(record))  # fmt: skip


def _data_of(record: DataRow) -> Row:
    """A row's columns. In our own files they stand under one key; where a person wrote a prompts.jsonl, beside the prompt's."""
    row, kind = record.record, record.record.get("type")
    if kind in ("prompt", "sample") and isinstance(whole := row.get(DATA), Mapping):
        return as_json(whole)
    if kind == "prompt":  # whose `solution` is the text that we wrote, unless it is none
        row = {name: row[name] for name in row if name not in _OF_PROMPT and not (name == "solution" and type(row[name]) is str)}
    return as_json({**(record.original or {}), **row})


def _unused(name: str, *taken: Collection[str]) -> str:
    names = chain([name], (f"{name}~{number}" for number in count(2)))
    return next(each for each in names if not any(each in some for some in taken))


def drawn_after(prompts: Sequence[Prompt], drawn: int, *, count: int, samples: int, seed: int) -> list[Prompt]:
    """The next `count` prompts, or as many as there are, after the first `drawn` of an order that is a function of the seed. No
    prompt is drawn twice before all were drawn once."""
    order = Order(np.zeros(len(prompts), np.int32), [1.0], 1, seed)
    chosen = [int(order.batch(position)[0]) for position in range(drawn, drawn + min(count, len(prompts)))]
    # where an epoch ends among them, a prompt may be drawn twice: it is used once
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
