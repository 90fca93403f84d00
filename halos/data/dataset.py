"""Tokenised rows on disk: written once as arrow, memory-mapped by every process, read row by row as numpy slices."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from halos import confined
from halos.data.arrow import FLOATS, INTS, Lists, column, numbers
from halos.errors import UserError
from halos.hashes import digest, file_hash
from halos.types import Comparison, Demonstration, Example, Judgement, Scored

KINDS: dict[str, type[Example]] = {kind.__name__: kind for kind in (Demonstration, Comparison, Judgement, Scored)}
ROWS, META, SEAL = "rows.arrow", "meta.json", "seal"
_COMPLETIONS = ("first", "second")  # of a pair the first is the chosen one
_LISTS = ("prompt", *_COMPLETIONS, *(f"{name}_spans" for name in _COMPLETIONS))
_SCHEMA = pa.schema(
    [(name, INTS) for name in _LISTS]
    + [(f"{name}_scored", pa.int32()) for name in _COMPLETIONS]
    + [("desirable", pa.int8()), ("margin", pa.float64()), ("reward", pa.float64()), ("logps", FLOATS)]
    + [("source", pa.int32()), ("group", pa.int64()), ("id", pa.string())]
)


@dataclass(frozen=True, slots=True)
class Completion:
    """What follows a prompt, and which of its tokens are scored."""

    ids: np.ndarray  # (tokens,) int32
    scored: np.ndarray  # (tokens,) bool


@dataclass(frozen=True, slots=True)
class Item:
    """One row of data as token ids."""

    prompt: np.ndarray  # (tokens,) int32, exactly what a sampler is fed
    completions: tuple[Completion, ...]  # one, or two of which the first is the chosen one
    desirable: bool  # of a Judgement; True elsewhere
    margin: float  # of a Comparison; 0 where the data names none
    id: str  # where the row came from, and which of the row's examples it is
    reward: float = 0.0  # of a Scored
    logps: np.ndarray | None = None  # (scored tokens,) float32, where a Scored came with its sampler's log-probs


@dataclass(slots=True)
class Counts:
    """What became of one source's rows."""

    name: str
    rows: int = 0  # read
    examples: int = 0  # a pair is two where labels are wanted
    kept: int = 0
    cut_turns: int = 0  # examples that lost their oldest turns
    cut_completions: int = 0  # completions that lost their end
    inexact: int = 0  # examples whose text does not continue the template's own generation prompt
    merged: int = 0  # examples whose last prompt characters and first words would have shared a token
    tokenised_anew: int = 0  # sampled completions whose own token ids were missing, or another tokenizer's
    dropped: dict[str, int] = field(default_factory=dict)  # examples by reason

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def line(self) -> str:
        """`a.jsonl: 120 rows, 118 examples kept; dropped 2 (2 longer than max_length)`."""
        parts = [f"{self.name}: {self.rows} rows, {self.kept} examples kept"]
        if self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            parts.append(f"dropped {sum(self.dropped.values())} ({reasons})")
        said = {
            "lost their oldest turns": self.cut_turns,
            "completions cut at max_length": self.cut_completions,
            "do not continue the template's generation prompt (it opens a thought that they lack)": self.inexact,
            "tokenised apart from their prompt, which shares a token with them": self.merged,
            "without token ids of this tokenizer: their text is tokenised, their log-probs are the starting policy's": (
                self.tokenised_anew
            ),
        }
        return "; ".join(parts + [f"{count} {what}" for what, count in said.items() if count])


class Writer:
    """Appends items to an arrow file, a batch at a time; equal prompts get one group number."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = (directory / ROWS).open("wb")
        self._arrow = pa.ipc.new_file(self._file, _SCHEMA)
        self._groups: dict[bytes, int] = {}
        self._content = hashlib.sha256()

    def write(self, items: Iterable[tuple[Item, int]]) -> None:
        """Each item with the index of its source."""
        columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        for item, source in items:
            _hash_item(self._content, item, source)
            columns["prompt"].append(item.prompt)
            for name, completion in zip(_COMPLETIONS, (*item.completions, None), strict=False):
                columns[name].append(completion.ids if completion else ())
                columns[f"{name}_spans"].append(_spans(completion.scored) if completion else ())
                columns[f"{name}_scored"].append(int(completion.scored.sum()) if completion else 0)
            columns["desirable"].append(item.desirable)
            columns["margin"].append(item.margin)
            columns["reward"].append(item.reward)
            columns["logps"].append(() if item.logps is None else item.logps)
            columns["source"].append(source)
            prompt = hashlib.blake2b(item.prompt.tobytes(), digest_size=16).digest()
            columns["group"].append(self._groups.setdefault(prompt, len(self._groups)))
            columns["id"].append(item.id)
        if columns["id"]:
            arrays = [column(columns[each.name], each.type) for each in _SCHEMA]
            self._arrow.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA))

    def finish(self, meta: dict[str, Any]) -> None:
        """Everything is on the disk when this returns."""
        self._arrow.close()
        self._file.flush()
        self._content.update(json.dumps([meta["kind"], meta["weights"]]).encode())
        whole = {**meta, "content": self._content.hexdigest(), "rows": digest(self._directory / ROWS)}
        with (self._directory / META).open("w") as notes:
            json.dump({**whole, SEAL: _seal_of(whole)}, notes, indent=1)
            for file in (self._file, notes):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._file.close()


def _seal_of(meta: Mapping[str, Any]) -> str:
    known = {name: value for name, value in meta.items() if name != SEAL}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def is_whole(path: Path, cache: Path | None = None) -> bool:
    """Whether a tokenised data set is, byte for byte, what was written; with a `cache` its rows are read once for as long as
    they stay what they were."""
    try:
        meta = confined.load_object(path / META)
        return meta.get(SEAL) == _seal_of(meta) and meta["rows"] == file_hash(path / ROWS, cache)
    except (UserError, OSError, KeyError):
        return False


def _hash_item(content: Any, item: Item, source: int) -> None:
    """All of an item that training sees; not where it came from, so that the same rows out of another file are the same."""
    arrays = [item.prompt, *(part for each in item.completions for part in (each.ids, each.scored))]
    arrays += [item.logps] if item.logps is not None else []
    content.update(json.dumps([source, item.desirable, item.margin, item.reward, [len(array) for array in arrays]]).encode())
    for array in arrays:
        content.update(np.ascontiguousarray(array).tobytes())


def _spans(scored: np.ndarray) -> np.ndarray:
    """Runs of True as [start, end, start, end, ...]."""
    if scored.all():
        return np.array([0, len(scored)], np.int32)
    return np.flatnonzero(np.diff(scored, prepend=False, append=False)).astype(np.int32)


class Dataset:
    """Items in the order in which they were read; whole columns where no row needs to be touched."""

    def __init__(self, path: Path) -> None:
        meta = json.loads((path / META).read_text())
        table = pa.ipc.open_file(pa.memory_map(str(path / ROWS))).read_all()
        self.kind = KINDS[meta["kind"]]
        self.weights: tuple[float, ...] = tuple(meta["weights"])  # of the sources
        self.content: str = meta["content"]  # a hash of all rows in their order, and of what becomes of them
        self.report = tuple(Counts(**counts) for counts in meta["report"])  # one per source
        self.groups = numbers(table["group"])  # (N,) equal prompts share a number
        self.sources = numbers(table["source"])  # (N,) index into weights and report
        names = _COMPLETIONS if self.kind is Comparison else _COMPLETIONS[:1]
        self._lists = {name: Lists(table[name]) for name in _LISTS}
        self._names = [(name, f"{name}_spans") for name in names]
        self.desirable = numbers(table["desirable"])  # (N,) of a Judgement; True elsewhere
        self._margin = numbers(table["margin"])
        self.rewards = numbers(table["reward"])  # (N,) of a Scored; 0 elsewhere
        self._logps = Lists(table["logps"])
        self._id = table["id"]
        self.scored = np.stack([numbers(table[f"{name}_scored"]) for name in names], 1)  # (N, completions) scored tokens
        self.prompt_lengths = self._lists["prompt"].lengths()  # (N,) tokens
        completion_lengths = np.stack([self._lists[name].lengths() for name in names], 1)
        self.lengths = self.prompt_lengths[:, None] + completion_lengths  # (N, completions) tokens of prompt and completion

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, row: int) -> Item:
        if not 0 <= row < len(self):
            raise IndexError(row)
        completions = tuple(_completion(self._lists[ids][row], self._lists[spans][row]) for ids, spans in self._names)
        desirable, margin = bool(self.desirable[row]), float(self._margin[row])
        reward, logps = float(self.rewards[row]), self._logps[row]
        name = self._id[row].as_py()
        return Item(self._lists["prompt"][row], completions, desirable, margin, name, reward, logps if len(logps) else None)

    def __iter__(self) -> Iterator[Item]:
        return (self[row] for row in range(len(self)))

    def lines(self) -> list[str]:
        """What became of the rows, one line a source."""
        return [counts.line() for counts in self.report]


def _completion(ids: np.ndarray, spans: np.ndarray) -> Completion:
    scored = np.zeros(len(ids), bool)
    for start, end in spans.reshape(-1, 2):
        scored[start:end] = True
    return Completion(ids, scored)


def open_dataset(path: Path) -> Dataset:
    """What `prepare` wrote."""
    return Dataset(path)
