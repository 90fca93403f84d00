"""Label samples: python -m halos.online.label samples.jsonl feedback.jsonl --reward exact_match --feedback pairwise

Instead of --reward, --reward-model DIR or --judge MODEL gives the scores. If it is killed, the same command resumes: a score that
was computed or paid for is kept. Under accelerate launch every rank scores a shard of the samples.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from tqdm import tqdm

from halos.config.rollout_modules import scorer_class, scorer_names
from halos.config.schema import Scorer as Settings
from halos.distributed.children import exit_process
from halos.errors import UserError, command
from halos.hashes import digest
from halos.online.options import FEEDBACK, SCORER, day
from halos.online.preferences import compare
from halos.online.records import (
    FileStore,
    ResumableFile,
    make_directory,
    open_on_all_ranks,
    read,
    read_located,
    read_meta,
    write_sealed,
)
from halos.rollout import collect, feedback
from halos.rollout.ranks import Ranks
from halos.rollout.scorers.scorer import Context, PairwiseScorer, Scorer, open_scorer
from halos.rollout.scores import lack, reasons
from halos.rollout.types import Rollout, Row, Sample, Score, numbered


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m halos.online.label", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    options.add_argument("samples", type=Path, help="a file of halos.online.sample, or of HALOs")
    options.add_argument("feedback", type=Path, help="the file to write, .jsonl or .json")
    SCORER.add_choice(options)
    options.add_argument(
        "--feedback", dest="kind", choices=(feedback.PAIRWISE, feedback.BINARY, feedback.SCALAR), default="pairwise"
    )
    options.add_argument("--truncated", choices=(feedback.KEEP, feedback.MASK, feedback.DROP), default=feedback.KEEP,
                         help="samples that were cut, as online.truncated; keep is the default")  # fmt: skip
    options.add_argument("--seed", type=int, default=0, help="for random pairing and the order of A and B")
    options.add_argument("--scores", type=Path, help="file for every sample's score (default: next to FEEDBACK)")
    options.add_argument("--against", type=Path, help="another policy's samples, compared with those of evaluation prompts")
    options.add_argument("--plugins", nargs="*", default=[], help="your packages that --reward may name")
    options.add_argument("--max-length", type=int, help="in tokens, for --reward-model: longer samples get no score")
    options.add_argument("--date", type=day, help="what a reward model's chat template writes as the date (default: today)")
    options.add_argument("--cache", type=Path, help="file that caches the judge's answers (default: next to FEEDBACK)")
    options.add_argument("--cache-dir", type=Path, default=Path("~/.cache/halos"))
    FEEDBACK.add(options.add_argument_group("online.feedback", "the keys of a configuration"))
    SCORER.add(options.add_argument_group("online.scorer", "the keys of a configuration"))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    return command(lambda: run(parser().parse_args(arguments)), stopped="scores so far are kept, and the same command resumes")


def run(args: argparse.Namespace) -> int:
    """Write the feedback file, and a file with the score of every sample. Raises UserError for wrong input, and where no sample
    to learn from has a score."""
    settings = _checked(args)
    threshold = feedback.check_threshold(args.kind, args.threshold)
    samples = read_samples(args.samples)
    if not samples:
        raise UserError(f"{args.samples} is empty")
    scores = args.scores or args.feedback.with_name(f"{args.feedback.stem}.scores.jsonl")
    ranks = Ranks.of_stage()
    answers = args.cache or args.feedback.with_name(f"{args.feedback.stem}.{settings.name}.jsonl")
    today = args.date or ranks.from_rank_0(date.today())
    given = Context(answers, args.plugins, args.cache_dir, args.max_length, quiet=not ranks.main, day=today)
    scorer = open_scorer(settings, given)
    for path in (args.feedback, scores, answers):
        make_directory(path.parent)  # before a score is paid for
    if settings.pairwise:
        assert isinstance(scorer, PairwiseScorer)
        return compare(args, samples, scorer, ranks)
    request = {"samples": digest(args.samples), **scorer.request()}
    file = ResumableFile(scores, request, rank=ranks.rank, recorded_since=scorer.recorded_since)
    if not ranks.from_rank_0(file.is_done() and not _lacking(_rollouts(scores))):
        open_on_all_ranks(file, ranks)
        with closing(scorer):
            seconds = _score(samples, scorer, file, ranks)
        file.open()
        if ranks.main:
            rows = [file.rows[sample.key] for sample in samples]
            file.finish([sample.key for sample in samples], {**counts(rows), "seconds": seconds})
    if ranks.main:
        _make_feedback(args, scores, threshold)
    ranks.barrier()
    return 0


def _checked(args: argparse.Namespace) -> Settings:
    """The scorer's settings. Raises UserError for arguments that contradict each other."""
    for path in (args.feedback, args.scores):
        if path is not None and path.resolve() == args.samples.resolve():
            raise UserError(f"{path} is the samples' own file: name another")
        if path is not None and path.is_dir():
            raise UserError(f"{path} is a directory: name a file in it")
    settings = SCORER.read_choice(args)
    scorer = scorer_class(settings.name)
    if settings.pairwise and not (scorer.compares and args.kind == feedback.PAIRWISE):
        needed = " or ".join(each.option.flag for each in map(scorer_class, scorer_names()) if each.compares)
        raise UserError(f"--pairwise needs {needed} and --feedback pairwise: it says which answer is better, and gives no score")
    made = FEEDBACK.read(args, kind=args.kind)
    idle = feedback.idle_key(made, args.kind, by_verdict=settings.pairwise, spelled=FEEDBACK.flag)
    if args.against is not None and not settings.pairwise:
        idle = "--against has no effect without --pairwise, by which a judge compares answers: leave it out"
    if args.max_length is not None and not scorer.loads_model:
        idle = f"--max-length has no effect with {scorer.option.flag}, which reads no tokens: leave it out"
    if args.date is not None and not scorer.loads_model:
        idle = f"--date has no effect with {scorer.option.flag}, which has no chat template: leave it out"
    if complaint := scorer.problem(settings, SCORER.flag) or idle:
        raise UserError(complaint)
    return settings


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, with the hash of the weights that they come from where the file records it. Raises UserError."""
    weights = read_meta(path).get("request", {}).get("model_sha256")
    samples = numbered((Sample.from_row(row, where), where) for row, where in read_located(path))
    return [replace(sample, weights=weights) if weights else sample for sample in samples]


def _score(samples: Sequence[Sample], scorer: Scorer, file: ResumableFile, ranks: Ranks) -> float:
    """Score the samples that have no score yet; return the seconds until the last rank was done, without loading a model."""
    store = FileStore[Rollout](file)
    missing = collect.to_score(samples, scorer, store)
    if scorer.is_paid:
        mine = missing if ranks.main else []
    else:
        mine = collect.shard(missing, ranks, whole_groups=scorer.needs_groups())
    if mine:
        scorer.load()
    began = time.perf_counter()
    with tqdm(total=len(mine), desc="labelling", unit="sample", delay=1, disable=None if ranks.main else True) as bar:
        for _ in collect.score(mine, scorer, store):
            bar.update()
    ranks.barrier()
    return round(time.perf_counter() - began, 2)


def _make_feedback(args: argparse.Namespace, scores: Path, threshold: float | str | None) -> None:
    settings = FEEDBACK.read(args, kind=args.kind)
    request = {"scores": digest(scores), "kind": args.kind, "pairing": settings.pairing, "threshold": threshold,
               "drop_equal": settings.drop_equal, "seed": args.seed, **feedback.truncation(args.truncated)}  # fmt: skip
    if args.feedback.exists() and read_meta(args.feedback).get("request") != request:
        raise UserError(f"{args.feedback} exists already, made from other scores or with other settings: name another file")
    rollouts = _rollouts(scores)
    if line := _lacking(rollouts):
        raise UserError(
            f"{line}; no feedback is written, {scores} has the reason for each, and the same command scores them again"
        )
    result, left_out = feedback.make(rollouts, settings, kind=args.kind, seed=args.seed, truncated=args.truncated)
    write_sealed(args.feedback, [each.to_row() for each in result], request, left_out)
    _report(args, read(scores), left_out)


def _rollouts(scores: Path) -> list[Rollout]:
    return [Rollout.from_row(row, f"{scores}:{number}") for number, row in enumerate(read(scores), 1)]


def _lacking(rollouts: Sequence[Rollout]) -> str | None:
    """Say why none of the samples to learn from, or where there are none of any, has a score; None where one has."""
    training = [rollout.score for rollout in rollouts if not rollout.prompt.is_eval]
    relevant = training or [rollout.score for rollout in rollouts]
    return lack(relevant) if all(score.value is None for score in relevant) else None


def counts(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts of samples with and without a score, these by reason, and the cost."""
    problems = reasons(map(Score.from_row, rows))
    return {"scored": len(rows) - sum(problems.values()), "without_score": sum(problems.values()), "problems": problems,
            "cost": sum(row.get("cost") or 0.0 for row in rows)}  # fmt: skip


def _report(args: argparse.Namespace, rows: Sequence[Row], left_out: dict[str, int]) -> None:
    totals = counts(rows)
    for line in (lack([Score.from_row(row) for row in rows]), feedback.all_desirable(left_out, args.threshold)):
        tqdm.write(line, file=sys.stderr) if line else None
    equal = f", {left_out['groups_all_equal']} of {left_out['groups']} prompts with equal scores" if left_out["groups"] else ""
    empty = f", {left_out['empty']} empty ones left out" if left_out.get("empty") else ""
    became = "dropped" if args.truncated == feedback.DROP else "masked"
    cut = f", {left_out['cut']} cut ones {became}" if left_out.get("cut") else ""
    tqdm.write(f"{args.feedback}: {left_out['rows']} rows of {args.kind} feedback from {totals['scored']} scores"
               f" ({totals['without_score']} samples without one{equal}{empty}{cut})", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    exit_process(main())
