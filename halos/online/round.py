"""One round of a walk: its stages are done when their files are there."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos import confined, seals
from halos.checkpoint import integrity, lineage
from halos.config import run_config
from halos.confined import UnreadableError, write_whole
from halos.data.sources import content_hash
from halos.errors import UserError
from halos.hashes import digest
from halos.models.locate import locate
from halos.online.plan import Plan
from halos.online.records import meta_path, read, read_meta, write
from halos.online.stages import StageError
from halos.rollout import measure
from halos.rollout.prompts import for_round, held_out
from halos.rollout.types import EVAL, TRAIN, Prompt, Rollout, Sample
from halos.rundir import RunDir, is_run

log = logging.getLogger(__name__)

NOTE = "round.json"  # in its directory: how far it is, and what it has come to
ORPHANS = 120.0  # seconds that ranks may take to save, whose launcher was killed


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What a round has come to: rows of metrics.jsonl, of its samples and of the held-out answers, and some samples."""

    train: Mapping[str, Any]
    held: Mapping[str, Any]
    examples: Sequence[Rollout]


class Round:
    """Its files lie in `directory`."""

    def __init__(self, plan: Plan, number: int, directory: Path) -> None:
        self.plan, self.number, self.directory = plan, number, directory
        directory.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, Any] = self._read()

    @property
    def is_done(self) -> bool:
        return bool(self.facts.get("done"))

    def go(self) -> RoundResult:
        """Prompts, samples, feedback, training: those that are not there yet."""
        began, fresh = time.perf_counter(), not (self.directory / "prompts.jsonl").is_file()
        plan, online = self.plan, self.plan.online
        self._prompts(for_round(plan.prompts, self.number, count=online.prompts_per_round, samples=online.samples_per_prompt,
                                seed=plan.config.seed))  # fmt: skip
        self._sample()
        self._label()
        self._train()
        self._note(wall=round(time.perf_counter() - began, 2), whole=fresh)
        return self._result()

    def examine(self) -> RoundResult:
        """Held-out prompts alone."""
        self._prompts([])
        self._sample()
        self._label()
        return self._result()

    def close(self, metrics: Mapping[str, Any], hooks: Mapping[str, Any]) -> None:
        """What it has come to is on record, with what the `hooks` remember of it: it is not looked at again."""
        self._note(done=True, metrics=metrics, hooks=hooks)

    def _read(self) -> dict[str, Any]:
        start: dict[str, Any] = {"round": self.number, "stages": {}, "whole": False, "wall": 0.0, "metrics": {}}
        try:
            found = confined.load_object(self.directory / NOTE, within=self.plan.directory.path)
        except UnreadableError:
            found = {}
        kept = {name: value for name, value in found.items() if isinstance(value, type(start.get(name, value)))}
        stages = kept.get("stages", {})
        fits = all(isinstance(each, dict) and isinstance(each.get("wall"), (int, float)) for each in stages.values())
        return {**start, **kept, "stages": stages if fits else {}}

    def _note(self, **facts: Any) -> None:
        self.facts |= facts
        write_whole(self.directory / NOTE, json.dumps(self.facts, indent=1) + "\n")

    def _stage(self, name: str, command: Sequence[str]) -> None:
        """One command; its time is that of the start that ended it."""
        began = time.perf_counter()
        self.plan.stages.run(command, self.directory / "logs" / f"{name}.log")
        self.facts["stages"][name] = {"wall": round(time.perf_counter() - began, 2)}
        self._note()

    def _prompts(self, chosen: Sequence[Prompt]) -> None:
        path, plan = self.directory / "prompts.jsonl", self.plan
        if not path.is_file():
            held = held_out(plan.held_out, count=plan.online.eval_prompts, seed=plan.config.seed)
            write(path, [prompt.to_row() for prompt in (*chosen, *held)])

    def _sample(self) -> None:
        path, plan = self.directory / "samples.jsonl", self.plan
        if path.is_file():
            self._refuse_others(path)
            if not sampled_from(path, plan.policy(self.number), plan.revision(self.number), plan.cache):
                raise UserError(f"{path} was sampled from other weights than those of {plan.policy(self.number)}: {self._again}")
            return
        seed = plan.config.seed * 1_000_003 + self.number
        policy = plan.policy(self.number)
        command = plan.stages.sample(policy, self.directory / "prompts.jsonl", path, seed=seed,
                                     max_length=plan.max_length, reference=plan.start,
                                     revision=plan.revision(self.number))  # fmt: skip
        self._note(policy=policy)
        self._stage("sample", command)

    def _label(self) -> None:
        path, plan = self.directory / "feedback.jsonl", self.plan
        if path.is_file():
            self._refuse_others(self.directory / "scores.jsonl")
            self._refuse_others(path)
            return
        first = plan.directory_of(0) / "samples.jsonl"
        command = plan.stages.label(
            self.directory / "samples.jsonl", path, kind=plan.kind, scores=self.directory / "scores.jsonl",
            cache=plan.directory.path / "judge.jsonl", against=first if self.number else None,
        )  # fmt: skip
        self._stage("label", command)

    @property
    def _again(self) -> str:
        return f"bring back what it was, or delete {self.directory}, and the round is made anew"

    def _refuse_others(self, path: Path) -> None:
        """Raises UserError where what an earlier start has written is not what it wrote, or was made from something else."""
        if path.is_file() and meta_path(path).is_file() and seals.are_written(path, meta_path(path)) is False:
            raise UserError(f"{path}: {seals.CHANGED}: {self._again}")
        request = read_meta(path).get("request")
        for name in ("samples", "scores"):
            made_from = self.directory / f"{name}.jsonl"
            known = request.get(name) if isinstance(request, dict) and path.name != "samples.jsonl" else None
            if known is not None and made_from.is_file() and digest(made_from) != known:
                raise UserError(f"{path} was made from another {made_from.name}: {self._again}")

    def _train(self) -> None:
        run, plan = RunDir(self.directory / "train"), self.plan
        if is_run(run.path) and run.is_finished() and run.final.is_dir():
            integrity.check_final(run, plan.cache)
            rows = self.directory / "feedback.jsonl"
            if not _trained_on(run, rows):
                raise UserError(f"{run.path} was trained on other rows than those of {rows}: {self._again}")
            return
        rows = read(self.directory / "feedback.jsonl")
        if not rows:
            raise UserError(
                f"round {self.number}: there is nothing to learn from: {self._why_nothing()}. Its files are kept in"
                f" {self.directory}; more samples of each prompt, a higher temperature or other prompts would be another run"
            )
        run.lock().refuse_held(wait=True, patience=ORPHANS)
        self._stage("train", plan.stages.train(plan.overrides_of(self.number)))
        if not (run.is_finished() and run.final.is_dir()):
            result = run.read_result() or {}
            raise StageError(f"training of round {self.number} did not finish: {result.get('reason') or result.get('status')}")

    def _why_nothing(self) -> str:
        rows = read(self.directory / "scores.jsonl") if (self.directory / "scores.jsonl").is_file() else []
        scores = [row.get("reward") for row in rows if row.get("split") != EVAL]
        if scores and all(score is None for score in scores):
            return f"none of {len(scores)} samples has a score ({rows[0].get('problem')})"
        return f"the scores of all samples of a prompt are equal, for every prompt ({len(scores)} samples)"

    def _result(self) -> RoundResult:
        """What was sampled to train on, and the held-out answers of the policy that sampled."""
        rollouts = self._rollouts()
        shown = measure.examples(rollouts, self.plan.online.show)
        return RoundResult(self._sampled(rollouts), self._held_out(rollouts), shown)

    def _held_out(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        held = measure.of_samples(rollouts, split=EVAL)
        judged = read_meta(self.directory / "feedback.jsonl").get("win_rate")  # by a judge that compares
        rate = judged if judged is not None else measure.win_rate(rollouts, self._first())
        return {**held, "win_rate": rate} if held and rate is not None else held

    def _sampled(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        metrics, sampled = measure.of_samples(rollouts, split=TRAIN), read_meta(self.directory / "samples.jsonl")
        if not metrics:
            return {}
        metrics |= {"kl": sampled["kl"]} if "kl" in sampled else {}
        labelled = read_meta(self.directory / "feedback.jsonl")
        if "compared" in labelled:  # by a judge that gives no scores
            metrics |= {"cost": labelled["cost"], "without_verdict": labelled["unparsable"], "ties": labelled["ties"]}
        else:
            metrics |= {"cost": sum(rollout.score.cost for rollout in rollouts)}
            metrics |= {"without_score": sum(rollout.score.value is None for rollout in rollouts)}
        metrics |= {"prompts_too_long": sampled.get("prompts_too_long", 0), "rows": len(read(self.directory / "feedback.jsonl"))}
        stages = {name: stage["wall"] for name, stage in self.facts["stages"].items()}
        metrics |= {f"seconds/{name}": spent for name, spent in stages.items()}
        if self.facts["whole"]:  # of a round that was gone on with, what lay between its starts is nobody's
            metrics["seconds/other"] = round(self.facts["wall"] - sum(stages.values()), 2)
        return metrics | self._of_training()

    def _of_training(self) -> dict[str, float]:
        """The loss over the round's training, in the mean."""
        rows = [row for row in RunDir(self.directory / "train").read_metrics() if row.get("split") == TRAIN]
        losses = [row["loss"] for row in rows if row.get("loss") is not None]
        return {"loss": sum(losses) / len(losses)} if losses else {}

    def _rollouts(self) -> list[Rollout]:
        """Every sample, with its score, or with the verdict of a judge that compares."""
        path, samples = self.directory / "scores.jsonl", self.directory / "samples.jsonl"
        rows = read(path) if path.is_file() else []
        if rows and "output" in rows[0]:
            return [Rollout.from_row(row, str(path)) for row in rows]
        return measure.judged([Sample.from_row(row, str(samples)) for row in read(samples)], rows)

    def _first(self) -> list[Rollout]:
        """Those of the first round; a judge that compares has left none."""
        path = self.plan.directory_of(0) / "scores.jsonl"
        return [Rollout.from_row(row, str(path)) for row in read(path) if "output" in row] if path.is_file() else []


def sampled_from(samples: Path, policy: str, revision: str | None, cache: Path) -> bool:
    """Whether samples are of a policy's weights, wherever that lay; of a server's samples only its name is known."""
    asked = read_meta(samples).get("request")
    if not isinstance(asked, dict):
        return False
    weights = asked.get("model_sha256")
    if weights is None:
        return asked.get("model") == policy
    return weights == lineage.identity(locate(policy, revision, cache), cache)


def _trained_on(run: RunDir, rows: Path) -> bool:
    """Whether a training's rows are those of a file; True where it is older than such records."""
    known = run_config.recorded_content(run.read_attempts(), str(run.path))
    return known is None or [each.get("hash") for each in known.sources["train"]] == [content_hash(str(rows), "train")]
