"""Tokenised data set on disk: an Arrow file, memory-mapped by every process, read item by item as numpy slices."""

import hashlib
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from halos import confined
from halos.data import cache
from halos.data.arrow import Lists, numbers
from halos.data.cache import META
from halos.data.mixture import Amount
from halos.errors import UserError
from halos.examples import Completion, Item
from halos.hashes import file_hash

ROWS, SEAL = "rows.arrow", "seal"
PLACES = 3  # rows named for each reason
CUT_TURNS, CUT_COMPLETIONS = "lost their oldest turns", "completions cut at max_length"


def completion_columns(num_completions: int) -> list[str]:
    """Return the columns of token ids; each also has a column of its scored spans, and one with the number of scored tokens."""
    return [f"completion_{number}" for number in range(num_completions)]


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


def seal_of(meta: Mapping[str, Any]) -> str:
    unsealed = {name: value for name, value in meta.items() if name != SEAL}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def is_whole(path: Path, hashes: Path | None = None) -> bool:
    """Return whether a tokenised data set is byte for byte as written. With `hashes`, a cache_dir, its rows are read again only
    when the file has changed."""
    try:
        meta = confined.load_object(path / META)
        return meta.get(SEAL) == seal_of(meta) and meta["rows"] == file_hash(path / ROWS, hashes)
    except (UserError, OSError, KeyError):
        return False


def publish(hidden: Path, path: Path) -> None:
    """Rename the complete directory into place; if another process was first, its result is as good."""
    try:
        hidden.rename(path)
    except OSError:
        if not is_whole(path):
            raise


class Dataset:
    """A tokenised data set: items in the order in which they were read, and whole columns without reading items."""

    sampled_here = False

    def __init__(self, path: Path) -> None:
        meta = json.loads((path / META).read_text())
        table = pa.ipc.open_file(pa.memory_map(str(path / ROWS))).read_all()
        self.weights: tuple[float, ...] = tuple(meta["weights"])  # of the sources, 1 where an entry has none
        self.amounts = tuple(Amount(*each) for each in meta.get("amounts", [])) or (Amount(),) * len(self.weights)
        self.content: str = meta["content"]  # a hash of all items in their order, their kind and the sources' weights
        self.largest_id: int = meta["largest_id"]  # of a token
        self.report = tuple(Counts(**counts) for counts in meta["report"])  # one per source
        self.names: tuple[str, ...] = tuple(meta.get("names", (counts.name for counts in self.report)))
        self.groups = numbers(table["group"])  # (N,) equal prompts share a number
        self.sources = numbers(table["source"])  # (N,) index into weights and report
        self.labels: dict[str, np.ndarray] = {name: numbers(table[f"label_{name}"]) for name in meta["labels"]}  # (N,) each
        self._table = table
        self._names = names = completion_columns(meta["completions"])
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

    def batches(self) -> Iterator[pa.Table]:
        """Yield all columns of the rows, as many at a time as were written."""
        return (pa.Table.from_batches([batch]) for batch in self._table.to_batches())

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
