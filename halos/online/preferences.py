"""A scorer that compares two answers: two samples of a training prompt, or on evaluation prompts two policies' answers."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from halos.errors import UserError
from halos.hashes import digest
from halos.online.records import ResumableFile, read_located, write
from halos.rollout import evaluation
from halos.rollout.feedback import DROP, KEEP, Pair, is_cut, truncation
from halos.rollout.ranks import Ranks
from halos.rollout.scorers.scorer import PairwiseScorer, Verdict
from halos.rollout.types import EVAL, Key, Rollout, Row, Sample, Score


@dataclass(frozen=True, slots=True)
class Match:
    """Two samples of one prompt to compare; half are shown `swapped`, so that the judge's position bias cancels."""

    one: Sample
    other: Sample
    swapped: bool

    @property
    def shown(self) -> tuple[Sample, Sample]:
        return (self.other, self.one) if self.swapped else (self.one, self.other)

    @property
    def is_worth_asking(self) -> bool:
        """Whether a verdict says anything: for training not of an empty answer, without words to learn, nor of equal ones."""
        texts = self.one.text, self.other.text
        return self.one.prompt.is_eval or (all(text.strip() for text in texts) and texts[0] != texts[1])

    def to_row(self, verdict: Verdict, scorer: str) -> Row:
        """A row with the verdict: A or B, as the two were shown, tie, or None."""
        better = verdict.better
        one_is_better = better in ("A", "B") and (better == "A") is not self.swapped
        first = Rollout(self.one, Score(None, cost=verdict.cost, scorer=scorer))
        pair = Pair(first, Rollout(self.other, Score(None)), self.swapped, one_is_better)
        won = {None: None, "tie": 0.5}.get(better, float(one_is_better))
        evaluation = {"split": EVAL, "won": won} if self.one.prompt.is_eval else {}
        answered = {"verdict": better, "said": verdict.answer[:400], "finish": verdict.finish}
        return {**pair.to_row(), **evaluation, **answered}


def compare(args: argparse.Namespace, samples: Sequence[Sample], scorer: PairwiseScorer, ranks: Ranks) -> int:
    """Compare random pairs of each training prompt's samples, and answers to evaluation prompts with those of `--against`."""
    if ranks.world > 1:
        raise UserError("a judge that compares runs in one process: it waits for the server, not for this machine")
    others = read_located(args.against) if args.against else []
    against = [Sample.from_row(row, where) for row, where in others]
    _check_prompts(samples, zip(against, (where for _, where in others), strict=True), args.samples)
    opponents = digest(args.against) if args.against else None
    request = {"samples": digest(args.samples), "against": opponents, "seed": args.seed, **scorer.request(),
               **truncation(args.truncated)}  # fmt: skip
    file = ResumableFile(args.feedback, request, recorded_since=scorer.recorded_since)
    if file.is_done():
        return 0
    file.open()
    matches = _matches(samples, {each.key: each for each in against if each.prompt.is_eval}, args.seed, args.truncated)
    asked = [number for number, match in enumerate(matches) if match.is_worth_asking]
    missing = [number for number in asked if str(number) not in file.rows]
    began = time.perf_counter()
    for index, verdict in scorer.compare([matches[number].shown for number in missing]):
        number = missing[index]
        file.add({str(number): matches[number].to_row(verdict, scorer.name())})
    rows = [file.rows[str(number)] for number in asked]
    if args.scores:
        write(args.scores, rows)
    usable = [str(number) for number, row in zip(asked, rows, strict=True)
              if row["verdict"] in ("A", "B") and row.get("split") != EVAL]  # fmt: skip
    totals, not_asked = counts(rows), len(matches) - len(asked)
    file.finish(usable, {**totals, "not_compared": not_asked, "seconds": round(time.perf_counter() - began, 2)})
    more = f", {not_asked} pairs with an empty answer or equal ones not compared" if not_asked else ""
    tqdm.write(f"{args.feedback}: {len(usable)} pairs, {totals['ties']} ties, {totals['unparsable']} unparsable answers{more}",
               file=sys.stderr)  # fmt: skip
    return 0


def _check_prompts(samples: Sequence[Sample], against: Iterable[tuple[Sample, str]], path: Path) -> None:
    """Raises UserError where the two files have different prompts with one id: the judge would compare answers to both."""
    turns = {each.prompt.id: each.prompt.turns for each in samples}
    for each, where in against:
        if turns.get(each.prompt.id, each.prompt.turns) != each.prompt.turns:
            raise UserError(f"{where}: its prompt_id {each.prompt.id!r} is that of another prompt in {path}")


def counts(rows: Sequence[Row]) -> dict[str, Any]:
    totals = {"unparsable": sum(row["verdict"] is None for row in rows), "ties": sum(row["verdict"] == "tie" for row in rows),
              "cost": sum(row["cost"] for row in rows), "compared": len(rows)}  # fmt: skip
    won: dict[str, list[float]] = {}
    for row in rows:
        if row.get("split") == EVAL and row["won"] is not None:
            won.setdefault(row["prompt_id"], []).append(row["won"])
    return totals | evaluation.of_wins(won.values())


def _matches(samples: Sequence[Sample], opponents: Mapping[Key, Sample], seed: int, truncated: str = KEEP) -> list[Match]:
    """A sample of an evaluation prompt meets the opponent's of the same number. Of samples that were cut, unless they are kept,
    none is compared for training: dropped ones are not paired, and a pair with a masked one would be left out."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt.id, []).append(sample)
    matches = []
    for name, group in groups.items():
        generator = random.Random(f"{seed}/{name}")
        if group[0].prompt.is_eval:
            matches += [Match(each, opponents[each.key], generator.random() < 0.5) for each in group if each.key in opponents]
            continue
        group = [sample for sample in group if truncated != DROP or not is_cut(sample)]
        generator.shuffle(group)
        drawn = [Match(a, b, generator.random() < 0.5) for a, b in zip(group[::2], group[1::2], strict=False)]
        matches += [each for each in drawn if truncated == KEEP or not (is_cut(each.one) or is_cut(each.other))]
    return matches
