"""Tokenised data set on disk: written once as Arrow, memory-mapped by every process, read item by item as numpy slices."""

import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from halos import confined
from halos.data import cache
from halos.data.arrow import FLOATS, INTS, Lists, column, numbers
from halos.data.cache import META
from halos.data.mixture import Amount
from halos.errors import UserError
from halos.examples import Completion, Item
from halos.hashes import digest, file_hash

ROWS, SEAL = "rows.arrow", "seal"
PLACES = 3  # rows named for each reason
CUT_TURNS, CUT_COMPLETIONS = "lost their oldest turns", "completions cut at max_length"


def _names(num_completions: int) -> list[str]:
    """Return the columns of token ids; each also has a column of its scored spans, and one with the number of scored tokens."""
    return [f"completion_{number}" for number in range(num_completions)]


def _schema(item: Item) -> pa.Schema:
    """Return the schema for items of the same example type as `item`."""
    names = _names(len(item.completions))
    return pa.schema(
        [(name, INTS) for name in ("prompt", *names, *(f"{name}_spans" for name in names))]
        + [(f"{name}_scored", pa.int32()) for name in names]
        + [(f"{name}_key", pa.int64()) for name in ("prompt", *names)]
        + [(f"label_{name}", pa.float64()) for name in item.labels]
        + [("step_labels", FLOATS)] * (item.step_labels is not None)
        + [("logps", FLOATS), ("teacher_logps", FLOATS), ("source", pa.int32()), ("group", pa.int64()), ("id", pa.string())]
    )


@dataclass(slots=True)
class Counts:
    """Counts of one source: rows read, examples kept, truncated and dropped."""

    name: str
    rows: int = 0  # read
    examples: int = 0  # a pair is two where the loss takes labels
    kept: int = 0
    cut_turns: int = 0  # examples that lost their oldest turns
    cut_completions: int = 0  # completions that lost their end
    cut_steps: int = 0  # steps with a label that they lost with it
    inexact: int = 0  # examples whose text does not continue the template's generation prompt
    merged: int = 0  # examples where a token would span the end of the prompt and the start of the completion
    tokenised_anew: int = 0  # sampled completions without token ids, or with another tokenizer's
    dropped: dict[str, int] = field(default_factory=dict)  # examples by reason
    oddities: dict[str, int] = field(default_factory=dict)  # examples by what is odd about them, by the names of data/oddities.py
    splits: dict[str, int] = field(default_factory=dict)  # rows by the value of a column that names their split
    temperatures: dict[str, int] = field(default_factory=dict)  # examples with log-probs of their sampler, by its temperature
    places: dict[str, list[str]] = field(default_factory=dict)  # the first rows of each reason and oddity, a.jsonl:12
    noted: dict[str, int] = field(default_factory=dict)  # rows by what was made of their columns, or of their layout
    files: str = ""  # how many of each kind, where there are several kinds

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.remember(reason, where)

    def note(self, oddity: str, where: str) -> None:
        self.oddities[oddity] = self.oddities.get(oddity, 0) + 1
        self.remember(oddity, where)

    def read_as(self, notes: Iterable[str]) -> None:
        """Count what was made of the columns of a row."""
        for note in notes:
            self.noted[note] = self.noted.get(note, 0) + 1

    def remember(self, why: str, where: str) -> None:
        """Keep the place of a row, if it is one of the first with this reason."""
        if len(places := self.places.setdefault(why, [])) < PLACES and where not in places:
            places.append(where)

    def add(self, other: "Counts") -> None:
        """Add what became of further rows of the same source."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, int):
                setattr(self, each.name, mine + theirs)
            elif each.name != "places" and isinstance(mine, dict):
                mine.update({key: mine.get(key, 0) + count for key, count in theirs.items()})
        for why, places in other.places.items():
            for where in places:
                self.remember(why, where)

    def line(self) -> str:
        """Format as `a.jsonl: 120 rows, 118 examples kept; dropped 2 (2 longer than max_length)`."""
        parts = [f"{self.name}{f' ({self.files})' if self.files else ''}: {self.rows} rows, {self.kept} examples kept"]
        if self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            parts.append(f"dropped {sum(self.dropped.values())} ({reasons})")
        parts += [f"{count} {note}" for note, count in self.noted.items()]
        notes = {
            CUT_TURNS: self.cut_turns,
            CUT_COMPLETIONS: self.cut_completions,
            "steps cut off at max_length": self.cut_steps,
            "do not continue the template's generation prompt (it opens a thought that they lack)": self.inexact,
            "tokenised apart from their prompt, which shares a token with them": self.merged,
            "without token ids of this tokenizer: their text is tokenised": (self.tokenised_anew),
        }
        return "; ".join(parts + [f"{count} {what}" for what, count in notes.items() if count])


class Writer:
    """Appends items to an Arrow file, a batch at a time; equal prompts get the same group number."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = (directory / ROWS).open("wb")
        self._arrow: pa.RecordBatchFileWriter | None = None  # opened with the first items, which decide the columns
        self._schema, self._shape = pa.schema([]), (0, list[str]())
        self._groups: dict[bytes, int] = {}
        self._content, self._tokens = hashlib.sha256(), 0

    def write(self, items: Sequence[tuple[Item, int]]) -> None:
        """Write a batch of items, all of one example type, each with the index of its source."""
        if not items:
            return
        if self._arrow is None:
            first = items[0][0]
            self._schema, self._shape = _schema(first), (len(first.completions), list(first.labels))
            self._arrow = pa.ipc.new_file(self._file, self._schema)
        columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        for item, source in items:
            _hash_item(self._content, item, source)
            columns["prompt"].append(item.prompt)
            self._tokens += sum(len(item.prompt) + len(each.ids) for each in item.completions)
            for name, completion in zip(_names(self._shape[0]), item.completions, strict=True):
                columns[name].append(completion.ids)
                columns[f"{name}_spans"].append(_spans(completion.scored))
                columns[f"{name}_scored"].append(int(completion.scored.sum()))
                columns[f"{name}_key"].append(_key(completion.ids))
            for name, value in item.labels.items():
                columns[f"label_{name}"].append(value)
            columns["logps"].append(() if item.logps is None else item.logps)
            columns["teacher_logps"].append(() if item.teacher_logps is None else item.teacher_logps.reshape(-1))
            if item.step_labels is not None:
                columns["step_labels"].append(item.step_labels)
            columns["source"].append(source)
            prompt = hashlib.blake2b(item.prompt.tobytes(), digest_size=16).digest()
            columns["group"].append(self._groups.setdefault(prompt, len(self._groups)))
            columns["prompt_key"].append(_key(item.prompt))
            columns["id"].append(item.id)
        arrays = [column(columns[each.name], each.type) for each in self._schema]
        self._arrow.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def finish(self, meta: dict[str, Any]) -> None:
        """Write the metadata and sync both files to disk."""
        if self._arrow is not None:  # else the rows are none
            self._arrow.close()
        self._file.flush()
        amounts = [each for each in meta.get("amounts", ()) if each[0] is None and any(each)]  # counts and passes
        self._content.update(json.dumps([meta["kind"], meta["weights"], *([meta["amounts"]] if amounts else [])]).encode())
        completions, labels = self._shape
        whole = {**meta, "completions": completions, "labels": labels, "content": self._content.hexdigest(),
                 "tokens": self._tokens, "rows": digest(self._directory / ROWS)}  # fmt: skip
        with (self._directory / META).open("w") as meta_file:
            json.dump({**whole, SEAL: _seal_of(whole)}, meta_file, indent=1)
            for file in (self._file, meta_file):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()


def _seal_of(meta: Mapping[str, Any]) -> str:
    unsealed = {name: value for name, value in meta.items() if name != SEAL}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def is_whole(path: Path, hashes: Path | None = None) -> bool:
    """Return whether a tokenised data set is byte for byte as written. With `hashes`, a cache_dir, its rows are read again only
    when the file has changed."""
    try:
        meta = confined.load_object(path / META)
        return meta.get(SEAL) == _seal_of(meta) and meta["rows"] == file_hash(path / ROWS, hashes)
    except (UserError, OSError, KeyError):
        return False


def publish(hidden: Path, path: Path) -> None:
    """Rename the complete directory into place; if another process was first, its result is as good."""
    try:
        hidden.rename(path)
    except OSError:
        if not is_whole(path):
            raise


def _hash_item(content: Any, item: Item, source: int) -> None:
    """Add all that training reads of an item to a hash; not its origin, so that the same rows from another file hash equally."""
    arrays = [item.prompt, *(part for each in item.completions for part in (each.ids, each.scored))]
    arrays += [each for each in (item.logps, item.step_labels, item.teacher_logps) if each is not None]
    labels = dict(item.labels)
    # three come first, whether an item has them or not: as they stand in the hashes that runs have recorded
    always = [bool(labels.pop("desirable", 1.0)), labels.pop("margin", 0.0), labels.pop("reward", 0.0)]
    content.update(json.dumps([source, *always, [len(array) for array in arrays], *([labels] if labels else [])]).encode())
    for array in arrays:
        content.update(np.ascontiguousarray(array).tobytes())


def _key(ids: np.ndarray) -> int:
    """Return 64 bits that identify token ids by their content, the same in every data set."""
    return int.from_bytes(hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=8).digest(), signed=True)


def _spans(scored: np.ndarray) -> np.ndarray:
    """Return the runs of True as [start, end, start, end, ...]."""
    if scored.all():
        return np.array([0, len(scored)], np.int32)
    return np.flatnonzero(np.diff(scored, prepend=False, append=False)).astype(np.int32)


class Dataset:
    """A tokenised data set: items in the order in which they were read, and whole columns without reading items."""

    sampled_here = False

    def __init__(self, path: Path) -> None:
        meta = json.loads((path / META).read_text())
        table = pa.ipc.open_file(pa.memory_map(str(path / ROWS))).read_all()
        self.weights: tuple[float, ...] = tuple(meta["weights"])  # of the sources, 1 where an entry has none
        self.amounts = tuple(Amount(*each) for each in meta.get("amounts", [])) or (Amount(),) * len(self.weights)
        self.content: str = meta["content"]  # a hash of all items in their order, their kind and the sources' weights
        self.report = tuple(Counts(**counts) for counts in meta["report"])  # one per source
        self.names: tuple[str, ...] = tuple(meta.get("names", (counts.name for counts in self.report)))
        self.groups = numbers(table["group"])  # (N,) equal prompts share a number
        self.sources = numbers(table["source"])  # (N,) index into weights and report
        self.labels: dict[str, np.ndarray] = {name: numbers(table[f"label_{name}"]) for name in meta["labels"]}  # (N,) each
        self._names = names = _names(meta["completions"])
        self._lists = {each.name: Lists(table[each.name]) for each in table.schema if pa.types.is_list(each.type)}
        self.has_teacher = self._lists["teacher_logps"].lengths() > 0  # (N,) bool: whether each has what a teacher says of it
        self.has_logps = self._lists["logps"].lengths() > 0  # (N,) bool: whether each has its sampler's log-probs
        self._id, self._keys = table["id"], {name: table[f"{name}_key"] for name in ("prompt", *names)}
        self.scored = np.stack([numbers(table[f"{name}_scored"]) for name in names], 1)  # (N, completions) scored tokens
        self.prompt_lengths = self._lists["prompt"].lengths()  # (N,) tokens
        completion_lengths = np.stack([self._lists[name].lengths() for name in names], 1)
        self.lengths = self.prompt_lengths[:, None] + completion_lengths  # (N, completions) tokens of prompt and completion

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, row: int) -> Item:
        if not 0 <= row < len(self):
            raise IndexError(row)
        lists, step_labels = self._lists, self._lists.get("step_labels")
        completions = tuple(_completion(lists[name][row], lists[f"{name}_spans"][row]) for name in self._names)
        labels = {name: float(values[row]) for name, values in self.labels.items()}
        steps = step_labels[row] if step_labels is not None else None
        logps, teacher_logps = (each if len(each := lists[name][row]) else None for name in ("logps", "teacher_logps"))
        teacher_logps = teacher_logps.reshape(int(self.scored[row, 0]), -1) if teacher_logps is not None else None
        return Item(lists["prompt"][row], completions, self._id[row].as_py(), labels, logps, steps, teacher_logps)

    def __iter__(self) -> Iterator[Item]:
        return (self[row] for row in range(len(self)))

    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys of prompts (N,) and of completions (N, completions), equal where the token ids are, in any data set."""
        return numbers(self._keys["prompt"]), np.stack([numbers(self._keys[name]) for name in self._names], 1)

    def prompt_starts(self, count: int) -> np.ndarray:
        """Return the first `count` token ids of each prompt, -1 beyond its end: (N, count)."""
        return self._lists["prompt"].starts(count)

    def place(self, row: int) -> str:
        """Return where a row came from: a.jsonl:12."""
        return self._id[row].as_py().rpartition("#")[0]

    def lines(self) -> list[str]:
        """Return what became of the rows, one line per source."""
        return [counts.line() for counts in self.report]


def _completion(ids: np.ndarray, spans: np.ndarray) -> Completion:
    scored = np.zeros(len(ids), bool)
    for start, end in spans.reshape(-1, 2):
        scored[start:end] = True
    return Completion(ids, scored)


def open_dataset(path: Path) -> Dataset:
    """Open the directory that `prepare` returned; while the data set exists no other process removes it."""
    held, dataset = cache.taken(path), Dataset(path)
    weakref.finalize(dataset, held.close)
    return dataset
