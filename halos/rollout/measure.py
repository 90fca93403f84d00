"""What a round has come to, in numbers and in examples for people."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halos.confined import write_whole
from halos.rollout.feedback import by_prompt
from halos.rollout.types import EVAL, TRAIN, Row, question, text_of

PREFERRED, OTHER, TIE = "preferred", "not preferred", "tie"  # of two answers that a judge has compared
HELD_OUT = ("reward", "reward/std", "length", "cut", "samples", "examples")  # what is measured of held-out answers, score or none
LONGEST = 600  # characters of a prompt or completion that are shown


def of_samples(rows: Sequence[Row], *, split: str) -> dict[str, float]:
    """Rewards and what the samples are like, of the rows of one split; nothing where it has none."""
    some = [row for row in rows if row.get("split", TRAIN) == split]
    known = [row["reward"] for row in some if row.get("reward") is not None]
    if not some:
        return {}
    found = {
        "length": statistics.fmean(row.get("tokens") or 0 for row in some),
        "cut": statistics.fmean(row.get("finish") == "length" for row in some),
        "samples": len(some),
    }
    if known:
        found |= {"reward": statistics.fmean(known), "reward/std": statistics.pstdev(known)}
    if split == TRAIN:
        groups = by_prompt(some)
        found["unique"] = statistics.fmean(len({text_of(row["output"]) for row in group}) / len(group) for group in groups)
        scored = [[row["reward"] for row in group if row.get("reward") is not None] for group in groups]
        scored = [group for group in scored if group]
        if scored:
            found["reward/best"] = statistics.fmean(map(max, scored))
            found["groups/all_equal"] = statistics.fmean(max(group) == min(group) for group in scored)
    return found


def win_rate(rows: Sequence[Row], first: Sequence[Row]) -> float | None:
    """The share of held-out prompts that are answered better than by the first policy; where both are as good, half of one."""
    before = {row["prompt_id"]: row["reward"] for row in first if row.get("split") == EVAL and row.get("reward") is not None}
    pairs = [(row["reward"], before[row["prompt_id"]]) for row in rows
             if row.get("split") == EVAL and row.get("reward") is not None and row["prompt_id"] in before]  # fmt: skip
    if not pairs:
        return None
    return statistics.fmean(1.0 if now > then else 0.5 if math.isclose(now, then) else 0.0 for now, then in pairs)


def judged(samples: Sequence[Row], pairs: Sequence[Row]) -> list[Row]:
    """Samples with what a judge that compares has made of each; nothing of those that it was not asked about, or gave no answer
    about that could be read."""
    verdicts: dict[tuple[str, int], str] = {}
    held: dict[str, str] = {}
    for pair in pairs:
        if pair.get("split") == EVAL and pair.get("won") is not None:
            held[pair["prompt_id"]] = {1.0: PREFERRED, 0.5: TIE, 0.0: OTHER}[pair["won"]]
        elif pair.get("split") != EVAL and pair.get("verdict") is not None:
            for letter in ("A", "B"):
                said = TIE if pair["verdict"] == "tie" else PREFERRED if pair["verdict"] == letter else OTHER
                verdicts[(pair["prompt_id"], pair[f"sample_id_{letter}"])] = said
    said = [held.get(row["prompt_id"]) if row.get("split") == EVAL else verdicts.get((row["prompt_id"], row["sample_id"]))
            for row in samples]  # fmt: skip
    return [{**row, "verdict": each} if each else row for row, each in zip(samples, said, strict=True)]


def examples(rows: Sequence[Row], count: int) -> list[Row]:
    """Held-out answers first, then of as many prompts the best and the worst, or two that a judge has compared."""
    shown = [row for row in rows if row.get("split") == EVAL][:count]
    for group in by_prompt(row for row in rows if row.get("split", TRAIN) == TRAIN)[:count]:
        scored = sorted((row for row in group if row.get("reward") is not None), key=lambda row: row["reward"])
        compared = [row for said in (PREFERRED, OTHER) for row in group if row.get("verdict") == said]
        pair = [compared[0], compared[-1]] if len(compared) > 1 else []
        shown += [scored[-1], scored[0]] if len(scored) > 1 else scored or pair or group[:1]
    return shown


def write_examples(directory: Path, rows: Sequence[Row], title: str) -> None:
    """samples.md, and samples.html, which needs nothing but a browser."""
    lines = [f"# {title}", "", "| split | score | prompt | completion |", "| --- | --- | --- | --- |"]
    cells = [(row.get("split", TRAIN), _score(row), _short(question(row)), _short(text_of(row["output"]))) for row in rows]
    lines += ["| " + " | ".join(part.replace("|", "\\|").replace("\n", "<br>") for part in cell) + " |" for cell in cells]
    write_whole(directory / "samples.md", "\n".join(lines) + "\n")
    body = "".join("<tr>" + "".join(f"<td>{html.escape(part)}</td>" for part in cell) + "</tr>" for cell in cells)
    write_whole(directory / "samples.html", PAGE.format(title=html.escape(title), style=STYLE, rows=body))


def _score(row: Mapping[str, Any]) -> str:
    return f"{row['reward']:.4g}" if row.get("reward") is not None else str(row.get("verdict") or "none")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


STYLE = (
    "body{font:15px system-ui;margin:2em;max-width:100em}"
    "td,th{vertical-align:top;padding:.4em .8em;border-bottom:1px solid #ddd;white-space:pre-wrap;text-align:left}"
)
PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>{style}</style>
<h1>{title}</h1><table><tr><th>split</th><th>score</th><th>prompt</th><th>completion</th></tr>{rows}</table>
"""
