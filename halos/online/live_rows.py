"""The rows of one batch of a live loop: what was sampled, with the interface of a data set, and as a part of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from halos import confined
from halos.checkpoint import select, state
from halos.data.order import mismatched_partners
from halos.examples import Completion, Example, Item
from halos.hooks.base import Hook, Run
from halos.rollout.types import seed_of
from halos.trainers import rollout_cache
from halos.trainers.rollout_cache import RolloutCache

DIRECTORY = "batch"  # in a checkpoint
BATCH = "live_batch"  # the name under which a loop's LiveBatch is one of the run's hooks
ROWS, NAMES = "rows.safetensors", "rows.json"


class LiveRows:
    """The rows of the current batch, with the interface of a Dataset; replaced once the policy has learned from them.

    `passes` optimizer steps learn from a batch: `epochs` times each of its `minibatches`.
    """

    def __init__(self, kind: type[Example], *, sampled_here: bool, minibatches: int, epochs: int, seed: int) -> None:
        self.kind, self.seed, self.sampled_here = kind, seed, sampled_here  # by the model in training, in this process
        self.minibatches, self.epochs = minibatches, epochs
        self.number = -1  # of the batch
        self.drawn: int | None = None  # prompts so far; None in a run that began before this was counted
        self.cache: RolloutCache | None = None  # of a policy gradient, computed from the policy that sampled
        self._partners: np.ndarray | None = None
        self._set([], np.zeros(0, np.int64))

    @property
    def passes(self) -> int:
        return self.minibatches * self.epochs

    def fill(self, number: int, items: Sequence[Item], groups: np.ndarray) -> None:
        self.number, self.cache = number, None
        self._set(items, groups)

    def _set(self, items: Sequence[Item], groups: np.ndarray) -> None:
        self.items, self.groups, self._partners = list(items), groups, None
        self.prompt_lengths = np.array([len(item.prompt) for item in self.items], np.int64)
        self.scored = np.array([[int(each.scored.sum()) for each in item.completions] for item in self.items])
        self.lengths = np.array([[len(item.prompt) + len(each.ids) for each in item.completions] for item in self.items])
        names = self.items[0].labels if self.items else ()
        self.labels: dict[str, np.ndarray] = {name: np.array([item.labels[name] for item in self.items]) for name in names}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Item:
        return self.items[row]

    def lines(self) -> list[str]:
        return ["sampled from the policy in training"]

    def minibatch(self, turn: int) -> np.ndarray:
        """The rows of step `turn` of those that learn from this batch: every epoch cuts them into minibatches anew."""
        if self.passes == 1:
            return np.arange(len(self))
        epoch, number = divmod(turn, self.minibatches)
        order = np.random.default_rng([self.seed, self.number, epoch]).permutation(len(self))
        parts = np.array_split(order, min(self.minibatches, len(self)))
        return parts[number % len(parts)]

    @property
    def partners(self) -> np.ndarray:
        """For each row one of another prompt of the batch, a function of seed and number of the batch: (rows,)."""
        if self._partners is None:
            seed = seed_of(self.seed, "mismatched completions", self.number)
            self._partners = mismatched_partners(self.groups, seed, what=f"batch {self.number}")
        return self._partners

    # --- in a checkpoint -----------------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        directory.mkdir()
        arrays = {"groups": self.groups, **_flat("prompt", [item.prompt for item in self.items])}
        for n in range(len(self.items[0].completions)):
            arrays |= _flat(f"ids_{n}", [item.completions[n].ids for item in self.items])
            arrays |= _flat(f"scored_{n}", [item.completions[n].scored for item in self.items])
        if any(item.logps is not None for item in self.items):
            nothing = np.zeros(0, np.float32)
            arrays |= _flat("logps", [nothing if item.logps is None else item.logps for item in self.items])
        arrays |= {f"label {name}": values.astype(np.float64) for name, values in self.labels.items()}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / ROWS)
        (directory / NAMES).write_text(json.dumps({"number": self.number, "ids": [item.id for item in self.items]}) + "\n")
        if self.cache is not None:
            rollout_cache.save(directory, self.cache)

    def load(self, directory: Path) -> None:
        """Load the rows that `save` wrote. Raises UserError for other files."""
        arrays, names = load_file(directory / ROWS), confined.load_object(directory / NAMES, within=directory)
        columns = {name: list(_rows(arrays, name)) for name in arrays if f"{name} lengths" in arrays}
        labels = {name.removeprefix("label "): values for name, values in arrays.items() if name.startswith("label ")}
        completions = range(sum(name.startswith("ids_") for name in columns))
        items = [
            Item(
                columns["prompt"][row],
                tuple(Completion(columns[f"ids_{n}"][row], columns[f"scored_{n}"][row]) for n in completions),
                name,
                {label: float(values[row]) for label, values in labels.items()},
                columns["logps"][row] if "logps" in columns and len(columns["logps"][row]) else None,
            )
            for row, name in enumerate(names["ids"])
        ]
        self.fill(int(names["number"]), items, arrays["groups"])
        if (directory / rollout_cache.FILE).is_file():
            self.cache = rollout_cache.load(directory)


def number_in(directory: Path) -> int | None:
    """The number of the batch that `LiveRows.save` wrote there; None where there is none."""
    return int(confined.load_object(directory / NAMES, within=directory)["number"]) if directory.is_dir() else None


class LivePartners:
    """The partners in whatever batch is the current one."""

    def __init__(self, rows: LiveRows) -> None:
        self._rows = rows

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        return self._rows.partners[rows]


class LiveBatch(Hook):
    """Saves the batch in checkpoints of steps between its first and its last, so that a resumed run goes on with it; and how many
    prompts were drawn."""

    def __init__(self, rows: LiveRows) -> None:
        self.rows = rows

    def on_start(self, run: Run) -> None:
        checkpoint = run.directory.checkpoints / select.name_of(run.step)  # other hooks are restored from it before this is made
        states = state.load_progress(checkpoint / "state", run.step)["hooks"] if run.step else {}
        self.rows.drawn = states.get(BATCH, {}).get("drawn") if run.step else 0

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.rows.drawn}

    def on_save(self, run: Run, path: Path, *, final: bool) -> Callable[[], None] | None:
        if run.main and not final and run.step % self.rows.passes:
            self.rows.save(path / DIRECTORY)
        return None


def _flat(name: str, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate(rows), f"{name} lengths": np.array([len(row) for row in rows], np.int64)}


def _rows(arrays: dict[str, np.ndarray], name: str) -> Iterator[np.ndarray]:
    starts = np.cumsum([0, *arrays[f"{name} lengths"]])
    return (arrays[name][start:end] for start, end in pairwise(starts))
