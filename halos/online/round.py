"""One round of an online run: prompts, samples, feedback, training. A stage is done when its file exists."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos import confined, seals
from halos.checkpoint import integrity
from halos.config.bind import learns_from_single
from halos.config.rollout_modules import scorer_class
from halos.confined import UnreadableError, write_whole
from halos.errors import UserError
from halos.hashes import digest
from halos.online.origins import sampled_from, scored_alike, trained_on
from halos.online.plan import OnlinePlan
from halos.online.records import meta_path, num_drawn, read, read_meta, write_sealed
from halos.online.stages import StageError
from halos.rollout import evaluation, feedback, measure, rescore
from halos.rollout.prompts import drawn_after, eval_prompts
from halos.rollout.scores import function_metrics, lack
from halos.rollout.spent import START, Spent
from halos.rollout.types import EVAL, TRAIN, Prompt, Rollout, Sample, Score
from halos.rundir import RunDir, is_run

log = logging.getLogger(__name__)

STATE = "round.json"  # in the round's directory: its progress and results
SPENT_ON = {"sample": "sample", "label": "score", "train": "train"}  # stage -> the name that its seconds have in metrics
ORPHANS = 120.0  # seconds in which ranks whose launcher was killed may still be saving


@dataclass(frozen=True, slots=True)
class RoundResult:
    """Metrics of a round's training samples and of its evaluation, for metrics.jsonl, and some samples to show."""

    train: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    examples: Sequence[Rollout]


class Round:
    """Runs the stages of a round, whose files are in `directory`."""

    def __init__(self, plan: OnlinePlan, number: int, directory: Path) -> None:
        self.plan, self.number, self.directory = plan, number, directory
        directory.mkdir(parents=True, exist_ok=True)
        self.state: dict[str, Any] = self._read()
        self.spent = Spent(self.state["seconds"])
        self.is_resumed = (directory / "prompts.jsonl").is_file()

    @property
    def is_done(self) -> bool:
        return bool(self.state.get("done"))

    def run(self) -> RoundResult:
        """Run the stages that are not done: prompts, samples, feedback, training."""
        plan, online = self.plan, self.plan.online
        drawn, count = num_drawn([plan.directory_of(number) for number in range(self.number)]), plan.size.prompts
        chosen = drawn_after(plan.prompts, drawn, count=count, samples=online.samples_per_prompt, seed=plan.config.seed)
        self._prompts(chosen, drawn=drawn + min(count, len(plan.prompts)))
        self._sample()
        self._label()
        self._train()
        return self._result()

    def evaluate(self) -> RoundResult:
        """Sample and score the evaluation prompts only."""
        self._prompts([], drawn=0)
        self._sample()
        self._label()
        return self._result()

    def close(self, metrics: Mapping[str, Any], hooks: Mapping[str, Any]) -> None:
        """Mark the round as done, once its metrics are logged; `hooks` is the hooks' state after it."""
        self._write_state(done=True, metrics=metrics, hooks=hooks)

    def _read(self) -> dict[str, Any]:
        start: dict[str, Any] = {"round": self.number, "seconds": {}, "metrics": {}}
        try:
            saved = confined.load_object(self.directory / STATE, within=self.plan.directory.path)
        except UnreadableError:
            saved = {}
        kept = {name: value for name, value in saved.items() if isinstance(value, type(start.get(name, value)))}
        seconds = {name: value for name, value in kept.get("seconds", {}).items() if isinstance(value, (int, float))}
        return {**start, **kept, "seconds": seconds}

    def _write_state(self, **changes: Any) -> None:
        self.state |= changes
        write_whole(self.directory / STATE, json.dumps(self.state, indent=1) + "\n")

    def _stage(self, name: str, command: Sequence[str]) -> None:
        """Run one command. The time recorded is that of the attempt that completed it: its own work, and what its start took."""
        self.plan.refuse_edited_code()
        self.plan.stages.run(command, self.directory / "logs" / f"{name}.log")
        self.spent.charge(SPENT_ON[name], self._seconds_of(name))
        self._write_state(seconds=self.spent.seconds)

    def _seconds_of(self, name: str) -> float | None:
        """The seconds that a stage worked, once what it needs was loaded, as it recorded them itself."""
        if name == "train":
            record: Mapping[str, Any] = RunDir(self.directory / "train").read_result() or {}
        else:
            files = ("samples",) if name == "sample" else ("scores", "feedback")  # a judge that compares writes feedback alone
            record = next((meta for file in files if "seconds" in (meta := read_meta(self.directory / f"{file}.jsonl"))), {})
        seconds = record.get("seconds")
        return float(seconds) if isinstance(seconds, (int, float)) else None

    def _prompts(self, chosen: Sequence[Prompt], *, drawn: int) -> None:
        path, plan = self.directory / "prompts.jsonl", self.plan
        if not path.is_file():
            online, seed = plan.online, plan.config.seed
            held_out = eval_prompts(plan.eval_prompts, count=online.eval_prompts, seed=seed, samples=online.eval_samples,
                                    temperature=online.eval_temperature)  # fmt: skip
            write_sealed(path, [prompt.to_row() for prompt in (*chosen, *held_out)], {}, {"drawn": drawn})

    def _sample(self) -> None:
        path, plan = self.directory / "samples.jsonl", self.plan
        if path.is_file():
            self._refuse_changed(path)
            if not sampled_from(path, plan.policy(self.number), plan.revision(self.number), plan.cache):
                raise UserError(f"{path} was sampled from other weights than those of {plan.policy(self.number)}: {self._remedy}")
            return
        seed = plan.config.seed * 1_000_003 + self.number
        policy, before = plan.policy(self.number), plan.last_policy(self.number)
        command = plan.stages.sample(policy, self.directory / "prompts.jsonl", path, seed=seed,
                                     max_length=plan.max_length, reference=plan.start,
                                     revision=plan.revision(self.number), previous=before, date=plan.date,
                                     previous_revision=plan.revision(self.number - 1) if before else None)  # fmt: skip
        self._write_state(policy=policy)
        self._stage("sample", command)
        self._warn_of_mismatch(read_meta(path))

    def _warn_of_mismatch(self, sampled: Mapping[str, Any]) -> None:
        bound = rescore.warned_above(self.plan.online.sampler)
        if (mean := sampled.get("mismatch/mean", 0.0)) > bound:
            log.warning("round %d: %s", self.number, rescore.warning(mean, sampled["mismatch/max"], sampled["rescored"], bound))

    def _label(self) -> None:
        path, plan = self.directory / "feedback.jsonl", self.plan
        if path.is_file():
            self._refuse_changed(self.directory / "scores.jsonl")
            self._refuse_changed(path)
            return
        first = plan.directory_of(0) / "samples.jsonl"
        command = plan.stages.label(
            self.directory / "samples.jsonl", path, kind=plan.kind, scores=self.directory / "scores.jsonl",
            cache=plan.directory.path / f"{plan.online.scorer.name}.jsonl", against=first if self.number else None,
            date=plan.scorer_date,
        )  # fmt: skip
        self._stage("label", command)

    @property
    def _remedy(self) -> str:
        return f"restore the original, or delete {self.directory} to repeat the round"

    def _refuse_changed(self, path: Path) -> None:
        """Raises UserError where a file was changed after an earlier attempt wrote it, or was made from other input files."""
        if path.is_file() and meta_path(path).is_file() and seals.rows_are_intact(path, meta_path(path)) is False:
            raise UserError(f"{path}: {seals.CHANGED}: {self._remedy}")
        request = read_meta(path).get("request")
        for name in ("samples", "scores"):
            source = self.directory / f"{name}.jsonl"
            recorded = request.get(name) if isinstance(request, dict) and path.name != "samples.jsonl" else None
            if recorded is not None and source.is_file() and digest(source) != recorded:
                raise UserError(f"{path} was made from another {source.name}: {self._remedy}")

    def _train(self) -> None:
        run, plan = RunDir(self.directory / "train"), self.plan
        if is_run(run.path) and run.is_finished() and run.final.is_dir():
            integrity.check_final(run, plan.cache)
            rows = self.directory / "feedback.jsonl"
            if not trained_on(run, rows):
                raise UserError(f"{run.path} was trained on other rows than those of {rows}: {self._remedy}")
            return
        rows = read(self.directory / "feedback.jsonl")
        if all(row.get("masked") for row in rows):
            raise UserError(
                f"round {self.number}: there is nothing to learn from: {self._why_no_feedback()}. Its files are kept in"
                f" {self.directory}; start another run with more samples of each prompt, a higher temperature or other prompts"
            )
        self._warn_of_equal_groups()
        run.lock().refuse_held(wait=True, patience=ORPHANS)
        self._stage("train", plan.stages.train(plan.overrides_of(self.number)))
        if not (run.is_finished() and run.final.is_dir()):
            result = run.read_result() or {}
            raise StageError(f"training of round {self.number} did not finish: {result.get('reason') or result.get('status')}")

    def _warn_of_equal_groups(self) -> None:
        counts = read_meta(self.directory / "feedback.jsonl")
        equal, loss = counts.get("groups_all_equal"), self.plan.loss
        if line := feedback.all_desirable(counts, self.plan.online.feedback.threshold):
            log.warning("round %d: %s", self.number, line)
        if equal and equal == counts["groups"] and loss.on_rollouts and not learns_from_single(loss):
            log.warning(
                "round %d: at all %d prompts the samples have equal scores, so that nothing will be learned: more samples of each"
                " prompt, a higher temperature, prompts of another difficulty, or rewards with more than two values",
                self.number, equal,
            )  # fmt: skip

    def _why_no_feedback(self) -> str:
        counts, truncated = read_meta(self.directory / "feedback.jsonl"), self.plan.online.truncated
        if "compared" in counts:
            return (
                f"the judge preferred no sample to another of its prompt ({counts['ties']} ties, {counts['unparsable']} answers"
                f" without a verdict, {counts.get('not_compared', 0)} pairs with an empty answer or equal ones)"
            )
        rows = read(self.directory / "scores.jsonl") if (self.directory / "scores.jsonl").is_file() else []
        scores = [Score.from_row(row) for row in rows if row.get("split") != EVAL]
        if scores and all(score.value is None for score in scores):
            return str(lack(scores))
        more = feedback.nothing_of_cut(cut := counts.get("cut", 0), truncated)
        if cut and (counts.get("rows") or cut == len(scores)):
            return f"no sample is left ({len(scores)} samples{more})"
        return f"the scores of all samples of a prompt are equal, for every prompt ({len(scores)} samples{more})"

    def _result(self) -> RoundResult:
        """Metrics of the training samples, and of the answers to evaluation prompts by the policy that sampled them; the seconds
        are with the training's, or where there is none with the evaluation's."""
        rollouts = self._rollouts()
        shown = measure.examples(rollouts, self.plan.online.show)
        train, held_out = self._train_metrics(rollouts), self._eval_metrics(rollouts)
        self.spent.charge(START, None)
        seconds = self.spent.metrics()
        return RoundResult({**train, **seconds} if train else {}, held_out if train else {**held_out, **seconds}, shown)

    def _eval_metrics(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        metrics = evaluation.metrics_of(rollouts, self.plan.online)
        metrics |= function_metrics(measure.of_split(rollouts, EVAL))
        meta = read_meta(self.directory / "feedback.jsonl")
        judged = {name: value for name, value in meta.items() if name.startswith(evaluation.WIN_RATE)}  # by a judge that compares
        return {**metrics, **(judged or evaluation.win_rate(rollouts, self._first_rollouts()))} if metrics else {}

    def _train_metrics(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        metrics, sampled = measure.of_samples(rollouts, split=TRAIN), read_meta(self.directory / "samples.jsonl")
        if not metrics:
            return {}
        metrics |= {name: sampled[name] for name in ("kl", "mismatch/mean", "mismatch/max") if name in sampled}
        labelled = read_meta(self.directory / "feedback.jsonl")
        if "compared" in labelled:  # by a judge that compares and gives no scores
            metrics |= {"cost": labelled["cost"], "without_verdict": labelled["unparsable"], "ties": labelled["ties"]}
        else:
            metrics |= {"cost": sum(rollout.score.cost for rollout in rollouts)}
            own = measure.of_split(rollouts, TRAIN)
            metrics |= {"without_score": sum(rollout.score.value is None for rollout in own), **function_metrics(own)}
            if line := lack([rollout.score for rollout in rollouts]):
                log.warning("round %d: %s", self.number, line)
        metrics |= {"prompts_too_long": sampled.get("prompts_too_long", 0), "rows": len(read(self.directory / "feedback.jsonl"))}
        return metrics | self._of_training()

    def _of_training(self) -> dict[str, float]:
        """The mean loss over the round's training."""
        rows = [row for row in RunDir(self.directory / "train").read_metrics() if row.get("split") == TRAIN]
        losses = [row["loss"] for row in rows if row.get("loss") is not None]
        return {"loss": sum(losses) / len(losses)} if losses else {}

    def _rollouts(self) -> list[Rollout]:
        """Every sample with its score, or with the verdict of a judge that compares."""
        path, samples = self.directory / "scores.jsonl", self.directory / "samples.jsonl"
        rows = read(path) if path.is_file() else []
        if rows and "output" in rows[0]:
            return [Rollout.from_row(row, str(path)) for row in rows]
        return measure.with_verdicts([Sample.from_row(row, str(samples)) for row in read(samples)], rows)

    def _first_rollouts(self) -> list[Rollout]:
        """The rollouts of the first round; none where a judge compares, or where another scorer than this round's gave their
        scores, of which no number is comparable."""
        path = self.plan.directory_of(0) / "scores.jsonl"
        if not scored_alike(path, self.directory / path.name, scorer_class(self.plan.online.scorer.name).recorded_since):
            return []
        return [Rollout.from_row(row, str(path)) for row in read(path) if "output" in row] if path.is_file() else []


def refuse_too_few_rounds(plan: OnlinePlan) -> None:
    """Raises UserError where more rounds are done than the plan has: metrics of the others would be lost."""
    done, path = 0, plan.directory.path
    while (state := plan.directory_of(done) / STATE).is_file() and confined.load_object(state, within=path).get("done"):
        done += 1
    if done > plan.online.rounds:
        raise UserError(
            f"{path} has done {done} rounds, and would end after {plan.online.rounds}: give online.rounds={done} or more; the"
            f" policy of an earlier round is its train/FINAL, as long as online.keep_rounds keeps it"
        )
