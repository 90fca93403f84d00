"""A table of online runs by prompt: the number of samples, their mean reward, and the share of them with the full reward."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halos import confined
from halos.config.rollout_modules import scorer_class, scorer_names
from halos.confined import write_whole
from halos.errors import UserError
from halos.online.records import read
from halos.report.read import Record
from halos.rollout import batch_files
from halos.rollout.types import TRAIN, question

FILE = "prompts.csv"
HEADER = ("run", "split", "prompt_id", "samples", "scored", "reward", "full", "prompt")
CLOSE = 1e-12
SHOWN = 100  # characters of a prompt


@dataclass(slots=True)
class Answers:
    """The rewards of a prompt's samples, those without a score counted only."""

    prompt: str
    samples: int = 0
    rewards: list[float] = field(default_factory=list)


def write_prompts(records: Sequence[Record], output: Path) -> tuple[Path | None, list[str]]:
    """Write the table of the runs that have rollouts on disk; return its path, None where none has, and what is unreadable."""
    rows, problems = list[tuple[Any, ...]](), list[str]()
    for record in records:
        answers = dict[tuple[str, str], Answers]()
        try:
            for row in _rollouts(record.path):
                _count(answers, row)
        except UserError as error:
            problems.append(str(error))
        rows += _table(record, answers)
    if not rows:
        return None, problems
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *rows])
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / FILE, text.getvalue())
    return output / FILE, problems


def _rollouts(run: Path) -> Iterator[Mapping[str, Any]]:
    """All scored samples of a run: of the batches of a live loop that are kept, or of its rounds."""
    for path in batch_files.files_of(run).values():
        yield from batch_files.read(path, within=run)
    for path in sorted(run.glob("rounds/*/scores.jsonl")):
        confined.refuse_links(path, run)
        yield from (row for row in read(path) if "output" in row)  # a judge that compares gives no scores


def _count(answers: dict[tuple[str, str], Answers], row: Mapping[str, Any]) -> None:
    key = str(row.get("split") or TRAIN), str(row.get("prompt_id"))
    if key not in answers:
        turns = row.get("prompt")
        text = question([turn for turn in turns if isinstance(turn, dict) and "role" in turn]) if isinstance(turns, list) else ""
        answers[key] = Answers(" ".join(text.split())[:SHOWN])
    answers[key].samples += 1
    if isinstance(row.get("reward"), int | float):
        answers[key].rewards.append(float(row["reward"]))


def _table(record: Record, answers: Mapping[tuple[str, str], Answers]) -> list[tuple[Any, ...]]:
    """The rows of a run, the hardest prompts first."""
    full = _full_reward(record, [reward for each in answers.values() for reward in each.rewards])
    rows = list[tuple[Any, ...]]()
    for (split, name), each in answers.items():
        count = len(each.rewards)
        mean = sum(each.rewards) / count if count else None
        share = sum(reward > full - CLOSE for reward in each.rewards) / count if count else None
        rows.append((record.label, split, name, each.samples, count, _short(mean), _short(share), each.prompt))
    return sorted(rows, key=lambda row: (row[1] != TRAIN, row[5] is None, row[5] or 0.0, row[2]))


def _full_reward(record: Record, rewards: Sequence[float]) -> float:
    """The reward of a right answer: online.pass_reward, the scorer's own, or the highest of the run."""
    online = record.node("online")
    given, scorer = online.get("pass_reward"), (online.get("scorer") or {}).get("name")
    if given is None and scorer in scorer_names():
        given = scorer_class(scorer).full_marks
    return float(given) if isinstance(given, int | float) else max(rewards, default=0.0)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
