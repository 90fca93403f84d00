"""Label samples: python -m halos.online.label samples.jsonl feedback.jsonl --reward exact_match --feedback pairwise

A reward model or a judge in the place of --reward: --reward-model DIR, --judge MODEL. Killed and given again, the same command
goes on: a score that was computed or paid for is kept. Under accelerate launch every process scores its share.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from halos.confined import expanded
from halos.distributed.children import leave
from halos.errors import UserError, command
from halos.hashes import digest
from halos.online.records import Ledger, read, read_meta, write, write_sealed
from halos.rollout import feedback
from halos.rollout.ranks import Ranks
from halos.rollout.scorers.score import Labeller, Score
from halos.rollout.types import EVAL, Row, key_of

KEEP = 64  # scores that are written together, where they cost only time


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m halos.online.label", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("samples", type=Path, help="what halos.online.sample wrote, or HALOs' own")
    made.add_argument("feedback", type=Path, help="the file to write, .jsonl or .json")
    by = made.add_mutually_exclusive_group(required=True)
    by.add_argument("--reward", action="append", metavar="NAME", help="a function of halos.online.rewards, a dotted path, or a"
                    " mapping such as '{function: length, weight: 0.1, target: 50}'; several are added up")  # fmt: skip
    by.add_argument("--reward-model", help="a directory or hub id of a sequence classifier")
    by.add_argument("--judge", metavar="MODEL", help="a model behind an OpenAI-compatible API; its key is OPENAI_API_KEY")
    made.add_argument(
        "--feedback", dest="kind", choices=(feedback.PAIRWISE, feedback.BINARY, feedback.SCALAR), default="pairwise"
    )
    made.add_argument("--pairing", choices=("max", "random", "min"), default="max", help="of pairwise feedback (default max)")
    made.add_argument("--threshold", help="pairs: the difference to exceed; binary: mean, median or a number (default mean)")
    made.add_argument("--drop-equal", action="store_true", help="scalar: leave out groups whose rewards are all equal")
    made.add_argument("--seed", type=int, default=0, help="of random pairing and of the order of A and B")
    made.add_argument("--scores", type=Path, help="where every sample's score goes (default: beside FEEDBACK)")
    made.add_argument("--against", type=Path, help="other samples of the same prompts: held-out rows are compared with them")
    made.add_argument("--plugins", nargs="*", default=[], help="packages of yours that --reward may name")
    made.add_argument("--processes", type=int, default=2, help="that run --reward (default 2)")
    made.add_argument("--timeout", type=float, default=30.0, help="seconds for one sample's --reward (default 30)")
    made.add_argument("--label", type=int, help="which output of a --reward-model with several is the reward (HALOs': 1)")
    made.add_argument("--batch-size", type=int, default=16, help="of --reward-model (default 16)")
    made.add_argument("--max-length", type=int, help="of --reward-model: longer ones get no score")
    made.add_argument("--url", help="of the judge's API (default: OpenAI's)")
    made.add_argument("--pairwise", action="store_true", help="the judge compares two answers instead of grading one")
    made.add_argument("--rubric", type=Path, help="a text file (default: halos/rollout/scorers/rubrics)")
    made.add_argument("--concurrency", type=int, default=16, help="requests to the judge at once (default 16)")
    made.add_argument("--max-requests", type=int, help="to the judge, over all starts")
    made.add_argument("--max-cost", type=float, help="dollars, over all starts")
    made.add_argument("--price-in", type=float, default=0.0, help="dollars for a million tokens that the judge reads")
    made.add_argument("--price-out", type=float, default=0.0, help="and writes")
    made.add_argument("--cache", type=Path, help="where the judge's answers are kept (default: beside FEEDBACK)")
    made.add_argument("--cache-dir", type=Path, default=Path("~/.cache/halos"))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    return command(lambda: run(parser().parse_args(arguments)), stopped="what was scored is kept, and the same command goes on")


def run(given: argparse.Namespace) -> int:
    """feedback.jsonl, and scores.jsonl of every sample. Raises UserError for what is wrong."""
    _check(given)
    threshold = feedback.check_threshold(given.kind, given.threshold)
    samples = [_uniform(row, given.samples, number) for number, row in enumerate(read(given.samples), 1)]
    if not samples:
        raise UserError(f"{given.samples} is empty")
    _refuse_twins(samples, given.samples)
    ranks, began = Ranks(), time.perf_counter()
    generator = read_meta(given.samples).get("request", {}).get("model_sha256")
    if given.judge and given.pairwise:
        return _compare(given, samples, ranks, generator)
    labeller = _labeller(given, ranks)
    scores = given.scores or given.feedback.with_name(f"{given.feedback.stem}.scores.jsonl")
    ledger = Ledger(scores, {"samples": digest(given.samples), **labeller.request()}, rank=ranks.rank)
    if not ranks.first(ledger.is_done()):
        if ranks.main:
            ledger.open()
        ranks.wait()
        if not ranks.main:
            ledger.open()
        _score(labeller, samples, ledger, ranks, generator)
        ranks.wait()
        ledger.open()
        if ranks.main:
            seconds = round(time.perf_counter() - began, 2)
            rows = [ledger.rows[key_of(row)] for row in samples]
            ledger.finish([key_of(row) for row in samples], {**counts(rows), "seconds": seconds})
    if ranks.main:
        asked = {"scores": digest(scores), "kind": given.kind, "pairing": given.pairing, "threshold": threshold,
                 "drop_equal": given.drop_equal, "seed": given.seed}  # fmt: skip
        if given.feedback.exists() and read_meta(given.feedback).get("request") != asked:
            raise UserError(f"{given.feedback} is there already, and was not made from these scores in this way: name another")
        rows = read(scores)
        made, left_out = feedback.make(rows, kind=given.kind, pairing=given.pairing, threshold=threshold,
                                       drop_equal=given.drop_equal, seed=given.seed)  # fmt: skip
        write_sealed(given.feedback, made, asked, left_out)
        _tell(given, rows, left_out)
    ranks.wait()
    return 0


def _refuse_twins(samples: list[Row], path: Path) -> None:
    """Number samples of a prompt that have no number; raises UserError where two have the same."""
    seen: set[tuple[str, int]] = set()
    for number, row in enumerate(samples, 1):
        if row["sample_id"] is None:
            row["sample_id"] = sum(key[0] == row["prompt_id"] for key in seen)
        if key_of(row) in seen:
            raise UserError(f"{path}:{number}: there is a sample {row['sample_id']} of prompt {row['prompt_id']!r} already")
        seen.add(key_of(row))


def _check(given: argparse.Namespace) -> None:
    for path in (given.feedback, given.scores):
        if path is not None and path.resolve() == given.samples.resolve():
            raise UserError(f"{path} is the samples' own file: name another")
        if path is not None and path.is_dir():
            raise UserError(f"{path} is a directory: name a file in it")
    for name, least in (("processes", 1), ("batch_size", 1), ("concurrency", 1), ("max_requests", 1), ("timeout", 0.001)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} takes a number from {least} on, not {value}")
    if given.pairwise and (not given.judge or given.kind != feedback.PAIRWISE):
        raise UserError("--pairwise is of a --judge, and gives --feedback pairwise: it says which of two is better, and no score")


def _uniform(row: Row, path: Path, number: int) -> Row:
    """A sample as ours; HALOs' have no `prompt` in its AlpacaEval mode, but an `instruction`."""
    if "output" not in row or ("prompt" not in row and "instruction" not in row) or "prompt_id" not in row:
        found = ", ".join(row) or "none"
        raise UserError(f"{path}:{number}: a sample has prompt_id, prompt (or instruction) and output; this row has {found}")
    prompt = row["prompt"] if "prompt" in row else row["instruction"]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for name, value in (("prompt", prompt), ("output", row["output"])):
        turns = [] if isinstance(value, str) and name == "output" else value
        if not isinstance(turns, list) or not all(isinstance(turn, dict) and "role" in turn for turn in turns):
            raise UserError(f"{path}:{number}: {name} is {str(value)[:60]!r}; it takes text or a list of messages")
    sample = row.get("sample_id")
    if sample is not None and not (isinstance(sample, int) and not isinstance(sample, bool)):
        raise UserError(f"{path}:{number}: sample_id is {sample!r}, not a whole number")
    return {**row, "prompt": prompt, "prompt_id": str(row["prompt_id"]), "sample_id": sample}


def _labeller(given: argparse.Namespace, ranks: Ranks) -> Labeller:
    if given.reward:
        from halos.rollout.scorers.functions import Functions, parts_of

        try:
            entries = [yaml.safe_load(entry) for entry in given.reward]
        except yaml.YAMLError as error:
            raise UserError(f"--reward cannot be read: {' '.join(str(error).split())}") from error
        parts = parts_of(entries, given.plugins)
        return Functions(parts, processes=given.processes, timeout=given.timeout, plugins=given.plugins)
    if given.judge:
        return _judge(given)
    from halos.models.locate import locate
    from halos.rollout.scorers.reward_model import RewardModel

    place = locate(given.reward_model, None, expanded(given.cache_dir))
    return RewardModel(place, label=given.label, batch_size=given.batch_size, max_length=given.max_length, quiet=not ranks.main)


def _judge(given: argparse.Namespace) -> Any:
    from halos.rollout.scorers.judge import Judge, Settings

    settings = Settings(
        model=given.judge, url=given.url, rubric=given.rubric, concurrency=given.concurrency, max_requests=given.max_requests,
        max_cost=given.max_cost, price_in=given.price_in, price_out=given.price_out,
        cache=given.cache or given.feedback.with_name(f"{given.feedback.stem}.judge.jsonl"),
    )  # fmt: skip
    return Judge(settings, pairwise=given.pairwise)


def _score(labeller: Labeller, samples: Sequence[Row], ledger: Ledger, ranks: Ranks, generator: str | None) -> None:
    missing = [row for row in samples if key_of(row) not in ledger.rows][ranks.rank :: ranks.world]
    bar = tqdm(total=len(missing), desc="labelling", unit="sample", delay=1, disable=None if ranks.main else True)
    found: dict[Any, Row] = {}
    with bar:
        for sample, score in labeller.score(missing):
            bar.update()
            found[key_of(sample)] = _row(sample, score, labeller.name(), generator)
            if len(found) >= KEEP:
                ledger.add(found)
                found = {}
    if found:
        ledger.add(found)


def _row(sample: Row, score: Score, labeller: str, generator: str | None) -> Row:
    facts = {"labeller": labeller, "cost": score.cost}
    facts |= {"generator_sha256": generator} if generator else {}
    facts |= {"problem": score.problem} if score.problem else {}
    facts |= {"parts": dict(score.detail)} if score.detail else {}
    return feedback.scored(sample, score.value, **facts)


def counts(rows: Sequence[Row]) -> dict[str, Any]:
    """How many have a score, and why the others have none."""
    problems: dict[str, int] = {}
    for row in rows:
        if row["reward"] is None:
            problems[row["problem"]] = problems.get(row["problem"], 0) + 1
    return {"scored": sum(row["reward"] is not None for row in rows), "without_score": sum(problems.values()),
            "problems": dict(sorted(problems.items(), key=lambda each: -each[1])[:10]),
            "cost": sum(row.get("cost") or 0.0 for row in rows)}  # fmt: skip


def _tell(given: argparse.Namespace, rows: Sequence[Row], left_out: dict[str, int]) -> None:
    told = counts(rows)
    for problem, count in list(told["problems"].items())[:3]:
        tqdm.write(f"no score for {count}: {problem}", file=sys.stderr)
    equal = f", {left_out['groups_all_equal']} of {left_out['groups']} prompts with equal scores" if left_out["groups"] else ""
    empty = f", {left_out['empty']} that say nothing left out" if left_out.get("empty") else ""
    tqdm.write(f"{given.feedback}: {left_out['rows']} rows of {given.kind} feedback from {told['scored']} scores"
               f" ({told['without_score']} samples without one{equal}{empty})", file=sys.stderr)  # fmt: skip


# --- a judge that compares -----------------------------------------------------------------------------------------------


def _compare(given: argparse.Namespace, samples: Sequence[Row], ranks: Ranks, generator: str | None) -> int:
    """Pairs of a prompt's samples, in an order that is drawn; held-out ones with the answer of `--against`."""
    if ranks.world > 1:
        raise UserError("a judge that compares needs one process: it waits for the server, not for this machine")
    judge = _judge(given)
    others = {row["prompt_id"]: row for row in map(lambda each: _uniform(each, given.against, 0), read(given.against))
              if row.get("split") == EVAL} if given.against else {}  # fmt: skip
    rivals = digest(given.against) if given.against else None
    ledger = Ledger(given.feedback, {"samples": digest(given.samples), "against": rivals, "seed": given.seed, **judge.request()})
    if ledger.is_done():
        return 0
    ledger.open()
    pairs = _to_compare(samples, others, given.seed)
    keys = [f"{number}" for number in range(len(pairs))]
    asked = [number for number in range(len(pairs)) if keys[number] not in ledger.rows]
    for place, said, answer in judge.compare([_shown(pairs[number]) for number in asked]):
        number = asked[place]
        one, other, swapped = pairs[number]
        origin = {"labeller": judge.name(), "cost": answer.cost, **({"generator_sha256": generator} if generator else {})}
        better = None if said in (None, "tie") else (said == "A") is not swapped
        row = feedback.pair({**one, **origin, "reward": None}, {**other, **origin, "cost": 0.0, "reward": None}, swapped=swapped,
                            first_is_better=better)  # fmt: skip
        split = (
            {"split": EVAL, "won": {None: None, "tie": 0.5}.get(said, float(bool(better)))} if one.get("split") == EVAL else {}
        )
        ledger.add({keys[number]: {**row, **split, "verdict": said, "said": answer.text[:400], "finish": answer.finish}})
    rows = [ledger.rows[key] for key in keys]
    told = {"unparsable": sum(row["verdict"] is None for row in rows), "ties": sum(row["verdict"] == "tie" for row in rows),
            "cost": sum(row["cost"] for row in rows), "compared": len(rows)}  # fmt: skip
    won = [row["won"] for row in rows if row.get("split") == EVAL and row["won"] is not None]
    told |= {"win_rate": sum(won) / len(won)} if won else {}
    if given.scores:
        write(given.scores, rows)
    usable = [key for key in keys if ledger.rows[key]["verdict"] in ("A", "B") and ledger.rows[key].get("split") != EVAL]
    ledger.finish(usable, told)
    tqdm.write(f"{given.feedback}: {len(usable)} pairs, {told['ties']} ties, {told['unparsable']} answers that say nothing",
               file=sys.stderr)  # fmt: skip
    return 0


def _to_compare(samples: Sequence[Row], others: dict[str, Row], seed: int) -> list[tuple[Row, Row, bool]]:
    """Two samples each, and whether the second is shown first: drawn, so that no place is favoured."""
    found = []
    for group in feedback.by_prompt(samples):
        dice = random.Random(f"{seed}/{group[0]['prompt_id']}")
        if group[0].get("split") == EVAL:
            rival = others.get(group[0]["prompt_id"])
            found += [(group[0], rival, dice.random() < 0.5)] if rival else []
            continue
        dice.shuffle(group)
        found += [(a, b, dice.random() < 0.5) for a, b in zip(group[::2], group[1::2], strict=False)]
    return found


def _shown(pair: tuple[Row, Row, bool]) -> tuple[Row, Row]:
    one, other, swapped = pair
    return (other, one) if swapped else (one, other)


if __name__ == "__main__":
    leave(main())
