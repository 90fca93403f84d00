"""Rows and files that are nearly right: valid ones, mutated at random by a seed."""

import bz2
import copy
import gzip
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from halos.data.schemas.table import SCHEMAS

_TALK = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "one"}]
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_TOOLS = [_TALK[0], {"role": "assistant", "content": None, "tool_calls": [_CALL]},
          {"role": "tool", "content": "2", "tool_call_id": "1"}, _TALK[1]]  # fmt: skip
VALID: list[dict[str, Any]] = [
    *(dict(schema.row) for schema in SCHEMAS),
    *(dict(schema.same) for schema in SCHEMAS),
    {"messages": _TALK},
    {"messages": _TOOLS, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"prompt": "One?", "completion": "one", "label": True},
    {"prompt": "One?", "completion": "one", "reward": 0.5, "system": "Be brief."},
    {"prompt": _TALK[:1], "chosen": _TALK[1:], "rejected": "two", "margin": 1},
    {"type": "scalar_feedback", "prompt": _TALK[:1], "output": "one", "reward": 1.0, "output_ids": [1, 2], "logps": [-1.0, -2.0],
     "vocabulary": "x", "finish": "stop", "masked": False},
    {"type": "pairwise_feedback", "prompt": _TALK[:1], "output_A": "one", "output_B": "two", "label": 1, "reward_A": 1.0,
     "reward_B": 0.0, "output_ids_A": [1], "output_ids_B": [2], "vocabulary": "x"},
    {"type": "binary_feedback", "prompt": _TALK[:1], "output": "one", "label": 1},
    {"type": "sample", "prompt": _TALK[:1], "output": "one"},
    {"prompt": "a", "completion": "b", "chat_template_kwargs": {"enable_thinking": False}},
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, float("nan"), float("inf"), 10**400, "", " ", "x", "one two", "\ud800", "<|im_end|>",
    "{", "[]", "null", [], {}, [[]], [None], [1], ["x"], {"a": 1}, {"role": "user"}, {"role": "user", "content": "x"},
    [{"role": "assistant", "content": "y"}], [{"from": "human", "value": "x"}], {"type": "text", "text": "q"},
    [{"type": "text", "text": "q"}], [{"type": "image", "url": "q"}], [{"role": ["user"], "content": {}}], b"bytes", "a" * 3000,
    {"a": {"b": {"c": [None, {"d": []}]}}},
]  # fmt: skip
KEYS = (
    "prompt", "completion", "messages", "chosen", "rejected", "label", "reward", "text", "tools", "system", "input", "history",
    "weight", "train", "role", "content", "tool_calls", "margin", "score_chosen", "kto_tag", "conversations", "reasoning_content",
    "type", "chat_template_kwargs", "answer", "question", "finish", "masked",
)  # fmt: skip


def row(draw: random.Random) -> dict[str, Any]:
    """A valid row with one to three values deleted, replaced or added, at any depth."""
    made = copy.deepcopy(draw.choice(VALID))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not (places := list(_places(made))):
            break
        holder, at = draw.choice(places)
        chance = draw.random()
        if chance < 0.2:
            del holder[at]
        elif chance < 0.75:
            holder[at] = copy.deepcopy(draw.choice(VALUES))
        elif isinstance(holder, dict):
            holder[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
        else:
            holder.insert(at, copy.deepcopy(draw.choice(VALUES)))
    return made


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list and object within `value`, with each of its indices and keys."""
    if isinstance(value, dict | list):
        for at, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, at
            yield from _places(part)


def files(directory: Path) -> list[Path]:
    """A valid file of three rows of each kind that is read."""
    rows = [{"prompt": f"What is {n}?", "completion": f'It is {n}, "and" no more.', "label": n % 2} for n in range(3)]
    lines = "".join(json.dumps(each) + "\n" for each in rows).encode()
    table = "prompt,completion,label\n" + "".join(f'"{each["prompt"]}","It is, or not.",{each["label"]}\n' for each in rows)
    content = {"a.jsonl": lines, "b.json": json.dumps(rows, indent=1).encode(), "c.csv": table.encode(),
               "d.tsv": table.replace(",", "\t").encode(), "e.jsonl.gz": gzip.compress(lines, mtime=0),
               "f.jsonl.bz2": bz2.compress(lines), "g.jsonl.xz": lzma.compress(lines),
               "h.csv.zst": pa.Codec("zstd").compress(table.encode(), asbytes=True)}  # fmt: skip
    for name, each in content.items():
        (directory / name).write_bytes(each)
    columns = pa.Table.from_pylist(rows)
    pq.write_table(columns, directory / "i.parquet")
    for name, writer in (("j.arrow", pa.ipc.new_stream), ("k.feather", pa.ipc.new_file)):
        with pa.OSFile(str(directory / name), "wb") as sink, writer(sink, columns.schema) as out:
            out.write_table(columns)
    return sorted(directory.iterdir())


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes of a file with some changed, cut out, repeated or put in."""
    at, length = draw.randrange(len(content)), draw.choice((1, 1, 2, 8, 40))
    middle = content[at : at + length]
    return content[:at] + draw.choice((
        b"", middle * 2, bytes(draw.randrange(256) for _ in middle), b"\x00" * length, b"\xff\xfe", b"\n", b'"', b"[{",
        b"\xe2\x82",
    )) + draw.choice((content[at + length :], content[at:], b""))  # fmt: skip
