"""A judge that compares two answers: pairs of a prompt's samples, and of held-out ones with another policy's answers."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from halos.errors import UserError
from halos.hashes import digest
from halos.online.records import Ledger, read, write
from halos.rollout.feedback import Pair
from halos.rollout.ranks import Ranks
from halos.rollout.scorers.judge import Answer, Judge
from halos.rollout.scorers.scorer import Scorer
from halos.rollout.types import EVAL, Rollout, Row, Sample, Score


@dataclass(frozen=True, slots=True)
class Match:
    """Two samples of one prompt, in the order in which they are drawn, or `swapped`, so that no place is favoured."""

    one: Sample
    other: Sample
    swapped: bool

    @property
    def shown(self) -> tuple[Sample, Sample]:
        return (self.other, self.one) if self.swapped else (self.one, self.other)

    def to_row(self, verdict: str | None, answer: Answer, scorer: str) -> Row:
        """What the judge made of it: A or B, which is how the two were shown, a tie, or nothing."""
        one_is_better = verdict in ("A", "B") and (verdict == "A") is not self.swapped
        first = Rollout(self.one, Score(None, cost=answer.cost, scorer=scorer))
        pair = Pair(first, Rollout(self.other, Score(None)), self.swapped, one_is_better)
        won = {None: None, "tie": 0.5}.get(verdict, float(one_is_better))
        held_out = {"split": EVAL, "won": won} if self.one.prompt.is_held_out else {}
        said = {"verdict": verdict, "said": answer.text[:400], "finish": answer.finish}
        return {**pair.to_row(), **held_out, **said}


def compare(args: argparse.Namespace, samples: Sequence[Sample], judge: Scorer, ranks: Ranks) -> int:
    """Pairs of a prompt's samples, in an order that is drawn; held-out ones with the answer of `--against`."""
    assert isinstance(judge, Judge)
    if ranks.world > 1:
        raise UserError("a judge that compares needs one process: it waits for the server, not for this machine")
    others = read(args.against) if args.against else []
    against = [Sample.from_row(row, f"{args.against}:{number}") for number, row in enumerate(others, 1)]
    rivals = digest(args.against) if args.against else None
    ledger = Ledger(args.feedback, {"samples": digest(args.samples), "against": rivals, "seed": args.seed, **judge.request()})
    if ledger.is_done():
        return 0
    ledger.open()
    matches = _drawn(samples, {each.prompt.id: each for each in against if each.prompt.is_held_out}, args.seed)
    asked = [number for number in range(len(matches)) if str(number) not in ledger.rows]
    for place, verdict, answer in judge.compare([matches[number].shown for number in asked]):
        number = asked[place]
        ledger.add({str(number): matches[number].to_row(verdict, answer, judge.name())})
    rows = [ledger.rows[str(number)] for number in range(len(matches))]
    if args.scores:
        write(args.scores, rows)
    usable = [str(n) for n, row in enumerate(rows) if row["verdict"] in ("A", "B") and row.get("split") != EVAL]
    told = counts(rows)
    ledger.finish(usable, told)
    tqdm.write(f"{args.feedback}: {len(usable)} pairs, {told['ties']} ties, {told['unparsable']} answers that say nothing",
               file=sys.stderr)  # fmt: skip
    return 0


def counts(rows: Sequence[Row]) -> dict[str, Any]:
    told = {"unparsable": sum(row["verdict"] is None for row in rows), "ties": sum(row["verdict"] == "tie" for row in rows),
            "cost": sum(row["cost"] for row in rows), "compared": len(rows)}  # fmt: skip
    won = [row["won"] for row in rows if row.get("split") == EVAL and row["won"] is not None]
    return told | ({"win_rate": sum(won) / len(won)} if won else {})


def _drawn(samples: Sequence[Sample], rivals: dict[str, Sample], seed: int) -> list[Match]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt.id, []).append(sample)
    matches = []
    for name, group in groups.items():
        dice = random.Random(f"{seed}/{name}")
        if group[0].prompt.is_held_out:
            matches += [Match(group[0], rivals[name], dice.random() < 0.5)] if name in rivals else []
            continue
        dice.shuffle(group)
        matches += [Match(a, b, dice.random() < 0.5) for a, b in zip(group[::2], group[1::2], strict=False)]
    return matches
