"""Metrics of sampled completions, and examples of them for people to read."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from halos.confined import write_whole
from halos.rollout.feedback import is_cut
from halos.rollout.types import EVAL, TRAIN, Rollout, Row, Sample, Score, by_prompt, question

PREFERRED, OTHER, TIE = "preferred", "not preferred", "tie"  # verdicts of a judge that compares two answers
MAX_SHOWN = 600  # characters of a prompt or completion in the examples


def of_split(rollouts: Iterable[Rollout], split: str) -> list[Rollout]:
    return [rollout for rollout in rollouts if (rollout.prompt.split or TRAIN) == split]


def sample_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Counts over samples: tokens, cut off and empty ones."""
    return {
        "samples": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "cut": sum(row["finish"] == "length" for row in rows),
        "empty": sum(not row["output"].strip() for row in rows),
    }


def of_samples(rollouts: Sequence[Rollout], *, split: str) -> dict[str, float]:
    """Metrics of the samples of one split, and of their rewards where they have any; empty where the split is."""
    some = of_split(rollouts, split)
    rewards = [rollout.reward for rollout in some if rollout.score.value is not None]
    if not some:
        return {}
    metrics = {
        "length": statistics.fmean(rollout.sample.tokens or 0 for rollout in some),
        "cut": statistics.fmean(is_cut(rollout.sample) for rollout in some),
        "samples": len(some),
    }
    if rewards:
        metrics |= {"reward": statistics.fmean(rewards), "reward/std": statistics.pstdev(rewards)}
    if split == TRAIN:
        groups = by_prompt(some)
        metrics["unique"] = statistics.fmean(len({rollout.sample.text for rollout in group}) / len(group) for group in groups)
        scored = [[rollout.reward for rollout in group if rollout.score.value is not None] for group in groups]
        scored = [group for group in scored if group]
        if scored:
            metrics["reward/best"] = statistics.fmean(map(max, scored))
            metrics["groups/all_equal"] = statistics.fmean(max(group) == min(group) for group in scored)
    return metrics


def with_verdicts(samples: Sequence[Sample], pairs: Sequence[Row]) -> list[Rollout]:
    """Samples with the verdicts of a judge that compares; None for those it did not compare, or whose answer was unreadable."""
    verdicts: dict[tuple[str, int], str] = {}
    eval_verdicts: dict[tuple[str, int], str] = {}
    for pair in pairs:
        if pair.get("split") == EVAL and pair.get("won") is not None:
            eval_verdicts[(pair["prompt_id"], pair["sample_id_A"])] = {1.0: PREFERRED, 0.5: TIE, 0.0: OTHER}[pair["won"]]
        elif pair.get("split") != EVAL and pair.get("verdict") is not None:
            for letter in ("A", "B"):
                verdict = TIE if pair["verdict"] == "tie" else PREFERRED if pair["verdict"] == letter else OTHER
                verdicts[(pair["prompt_id"], pair[f"sample_id_{letter}"])] = verdict
    found = [(eval_verdicts if each.prompt.is_eval else verdicts).get(each.key) for each in samples]
    return [Rollout(each, Score(None, verdict=verdict)) for each, verdict in zip(samples, found, strict=True)]


def examples(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """For `count` evaluation prompts, then for `count` training prompts, the best and the worst sample, or two that a judge
    compared."""
    shown = list[Rollout]()
    for group in (group for split in (EVAL, TRAIN) for group in by_prompt(of_split(rollouts, split))[:count]):
        scored = sorted((each for each in group if each.score.value is not None), key=lambda each: each.reward)
        compared = [each for verdict in (PREFERRED, OTHER) for each in group if each.score.verdict == verdict]
        pair = [compared[0], compared[-1]] if len(compared) > 1 else []
        shown += [scored[-1], scored[0]] if len(scored) > 1 else scored or pair or group[:1]
    return shown


def write_examples(directory: Path, rollouts: Sequence[Rollout], title: str, held_out: Sequence[str] = ()) -> None:
    """Write samples.md and a self-contained samples.html. `held_out`: what the evaluation measured, as text."""
    summary = f"held out: {', '.join(held_out)}" if held_out else ""
    lines = [f"# {title}", "", *([summary, ""] if summary else [])]
    lines += ["| split | score | prompt | completion |", "| --- | --- | --- | --- |"]
    cells = [(each.prompt.split or TRAIN, _score(each.score), _short(question(each.prompt.turns)), _short(each.sample.text))
             for each in rollouts]  # fmt: skip
    lines += ["| " + " | ".join(part.replace("|", "\\|").replace("\n", "<br>") for part in cell) + " |" for cell in cells]
    write_whole(directory / "samples.md", "\n".join(lines) + "\n")
    body = "".join("<tr>" + "".join(f"<td>{html.escape(part)}</td>" for part in cell) + "</tr>" for cell in cells)
    page = PAGE.format(title=html.escape(title), style=STYLE, summary=html.escape(summary), rows=body)
    write_whole(directory / "samples.html", page)


def _score(score: Score) -> str:
    return f"{score.value:.4g}" if score.value is not None else score.verdict or "none"


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " ..."


STYLE = (
    "body{font:15px system-ui;margin:2em;max-width:100em}"
    "td,th{vertical-align:top;padding:.4em .8em;border-bottom:1px solid #ddd;white-space:pre-wrap;text-align:left}"
)
PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>{style}</style>
<h1>{title}</h1><p>{summary}</p><table><tr><th>split</th><th>score</th><th>prompt</th><th>completion</th></tr>{rows}</table>
"""
