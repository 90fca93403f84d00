"""A live loop: batches are sampled from the policy in training, which learns from each before the next is sampled."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from halos.checkpoint import select
from halos.config.bind import LossSpec
from halos.config.schema import Config
from halos.confined import DISK_FULL
from halos.data.custom_format import entries_of
from halos.data.tokenize import Encoder
from halos.errors import UserError
from halos.examples import Completion, Demonstration, Example, Item
from halos.hooks.base import Run
from halos.metrics import LARGEST_DIFFERENCE
from halos.online.live_rollouts import LiveRollouts
from halos.online.live_rows import BATCH, DIRECTORY, LiveBatch, LiveRows, number_in
from halos.online.policy import PolicyEngine
from halos.online.unsharded import Unsharded
from halos.rollout import evaluation, feedback, measure, rescore
from halos.rollout.collect import collect
from halos.rollout.engines.engine import PolicyServer
from halos.rollout.prompts import answer, drawn_after, eval_prompts, fitting, read_prompts, room_for_prompts, unused_rows
from halos.rollout.ranks import Ranks
from halos.rollout.scorers.scorer import Scorer
from halos.rollout.scores import ScoringError, by_function, function_metrics, lack
from halos.rollout.spent import SECONDS
from halos.rollout.types import Prompt, Request, Rollout, Sample, requests_for
from halos.types import Mismatched

log = logging.getLogger(__name__)
HOOKS = (BATCH, "live_rollouts")  # names under which a loop's batch and its rollouts are saved

RETRY_OFFSET = 100_003  # in batches: where runs that do not count their prompts take those of a further attempt at a batch from
ATTEMPTS = 10  # the first at as many prompts as a batch has, the others at further ones, while it is not full
WITHOUT_SCORE = "samples/without_score"  # the fraction of a batch's samples


class LivePrompts:
    """The prompts of a live loop, read and tokenised before any model loads. Raises UserError for wrong input."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, loss: LossSpec, max_length: int) -> None:
        assert config.online is not None
        online = self.online = config.online
        _check_feedback(config, loss)
        self.max_length, new = max_length, online.sampler.max_new_tokens
        encoder, room = Encoder(tokenizer, max_length=2**31, truncation="drop"), room_for_prompts(new, max_length)
        unused, of_eval = Counter[str](), entries_of(config.data, "eval") if config.data.eval and online.eval_prompts else []
        train = read_prompts(entries_of(config.data, "train"), "train", unused=unused)
        held_out = read_prompts(of_eval, "eval", unused=unused) if of_eval else []
        held_out = eval_prompts(held_out, count=online.eval_prompts, seed=config.seed, samples=online.eval_samples,
                                temperature=online.eval_temperature)  # fmt: skip
        self.train = fitting(train, encoder, room)
        self.evaluation = fitting(held_out, encoder, room) if held_out else []
        if not self.train:
            raise UserError(f"no prompt leaves room for {answer(new)} within {max_length} tokens (train.max_length)")
        samples = online.samples_per_prompt
        pairwise = loss.inputs.feedback == feedback.PAIRWISE
        if pairwise and samples < 2:
            raise UserError("online.samples_per_prompt: pairs need 2 or more")
        self.per_prompt = feedback.rows_per_prompt(loss.inputs.feedback, samples, online.feedback.pairing)
        rows, what = config.train.batch_size * online.minibatches, "pairs" if pairwise else "completions"
        if rows < self.per_prompt:
            raise UserError(
                f"train.batch_size={config.train.batch_size} {what} cannot hold the {self.per_prompt} samples of one prompt"
            )
        self.per_batch = min(rows // self.per_prompt, len(self.train))  # prompts
        if loss.statistics_inputs is Mismatched and self.per_batch < 2:
            raise UserError(
                f"online.loss={loss.name} pairs each prompt of a batch with an answer to another, and a batch has one prompt:"
                f" train.batch_size={-(-2 * self.per_prompt // online.minibatches)} or more, and as many prompts"
            )
        steps = online.minibatches * online.epochs
        self.line = f"{len(self.train)} prompts, {self.per_batch} a batch, {samples} samples of each"
        self.line += f"; {steps} optimizer step{'s' if steps > 1 else ''} on each batch"
        self.line += f"; {len(self.evaluation)} held out{evaluation.plan_of(online) if self.evaluation else ''}"
        if dropped := len(train) + len(held_out) - len(self.train) - len(self.evaluation):
            self.line += f"; {dropped} prompts leave no room for an answer"
        self.line += unused_rows(unused)

    def requests(self, prompts: Sequence[Prompt], seed: int) -> list[Request]:
        sampler = self.online.sampler
        return requests_for(prompts, samples=self.online.samples_per_prompt, temperature=sampler.temperature,
                            max_new_tokens=sampler.max_new_tokens, max_length=self.max_length, seed=seed)  # fmt: skip


def _check_feedback(config: Config, loss: LossSpec) -> None:
    """Raises UserError in a new run for keys of online.feedback that do not act in this loop."""
    assert config.online is not None
    settings, kind = config.online.feedback, loss.inputs.feedback
    feedback.check_threshold(kind, settings.threshold)
    if config.resume is not None:
        return
    if settings.kind not in ("auto", kind):
        raise UserError(
            f"online.feedback.kind={settings.kind}: a live loop of {loss.name} learns from {kind} feedback: leave it out"
        )
    if idle := feedback.idle_key(settings, kind, by_verdict=False, spelled=lambda name: f"online.feedback.{name}"):
        raise UserError(idle)


class RolloutSource:
    """The source of global batches: every batch is sampled and scored, a shard on every rank, and every rank gets all of it; then
    `online.epochs` times its `online.minibatches` learn from it.

    Samples are a function of weights, seed and number of the batch, so a resumed run continues exactly.
    """

    def __init__(
        self, run: Run, loss: LossSpec, prompts: LivePrompts, scorer: Scorer, server: PolicyServer | None,
        policy: Unsharded,
    ) -> None:  # fmt: skip
        self.run, self.loss, self.prompts, self.online, self.config = run, loss, prompts, prompts.online, run.config
        self.scorer = scorer
        run.resources.callback(scorer.close)
        self.engine = PolicyEngine(run, server, policy, prompts.requests(prompts.train[: rescore.PROBES], 0))
        self.ranks = Ranks(run.accelerator.process_index, run.accelerator.num_processes)
        self.rows = LiveRows(loss.inputs.example, sampled_here=server is None, minibatches=self.online.minibatches,
                             epochs=self.online.epochs, seed=run.config.seed)  # fmt: skip
        self.files = LiveRollouts(keep=self.online.keep_rollouts, passes=self.rows.passes, scorer=scorer)
        run.hooks |= dict(zip(HOOKS, (LiveBatch(self.rows), self.files), strict=True))
        run.seconds_outside_training = {"sample": 0.0, "score": 0.0}
        self._made: dict[str, int] = {}  # counts of the batch's feedback
        self._warned = False  # of samples without a score
        self._mismatched = self._all_desirable = False  # a warning said so

    def batch(self, number: int) -> np.ndarray:
        """The rows of step `number`, counted from 0: sampled at the first step that learns from them; between that and the last
        loaded from the checkpoint that the run resumes from. That has others where a resume has changed the passes over a
        batch: then it is sampled there."""
        batch, turn = divmod(number, self.rows.passes)
        if self.rows.number != batch:
            saved = self.run.directory.checkpoints / select.name_of(number) / DIRECTORY
            if turn and number_in(saved) == batch:
                self.rows.load(saved)
            else:
                self._sample(batch)
        return self.rows.minibatch(turn)

    def _sample(self, number: int) -> None:
        """Sample batch `number`, from further prompts until it is full: of some nothing can be learned. Each is sampled once."""
        rollouts, full, have, drawn = list[Rollout](), self.prompts.per_batch, 0, self.rows.drawn
        for attempt in range(ATTEMPTS):
            start = (number + attempt * RETRY_OFFSET) * (full - have) if drawn is None else drawn
            chosen = drawn_after(self.prompts.train, start, count=full - have, samples=self.online.samples_per_prompt,
                                 seed=self.config.seed)  # fmt: skip
            drawn = None if drawn is None else drawn + full - have
            sampled = {rollout.prompt.id for rollout in rollouts}
            chosen = [prompt for prompt in chosen if prompt.id not in sampled]
            if not chosen:
                continue
            seed = (self.config.seed * 1_000_003 + number) * ATTEMPTS + attempt
            rollouts += self._collect(chosen, seed, self.run.seconds_outside_training)
            have = self._fill(number, rollouts)
            if have >= full:
                break
        line = lack([rollout.score for rollout in rollouts])
        if all(rollout.score.value is None for rollout in rollouts):
            raise ScoringError(f"step {self.run.step}: {line}")
        if not have:  # with nothing to learn, which the trainer warns of, and which ends no run
            have = self._fill(number, rollouts, drop_equal=False)
        if not have:
            cut = feedback.nothing_of_cut(_num_cut(rollouts), self.online.truncated)
            raise UserError(
                f"step {self.run.step}: in {len(rollouts)} samples none was better than another of its prompt: more"
                f" online.samples_per_prompt, a higher temperature, or other prompts{f'; {line}' if line else ''}{cut}"
            )
        if self.loss.statistics_inputs is Mismatched and len(np.unique(self.rows.groups)) < 2:
            raise UserError(
                f"step {self.run.step}: of {len(rollouts)} samples only those of one prompt have a score and words, and"
                f" {self.loss.name} pairs each prompt with an answer to another"
            )
        self.rows.drawn = drawn  # a checkpoint that is saved after an error in a batch draws its prompts again
        self._warn_of_labels()
        self._count(rollouts)
        self.files.write(self.run, number, rollouts)
        if not self.loss.on_rollouts:  # else the trainer compares all of them
            self._rescore(rollouts)

    def _count(self, rollouts: Sequence[Rollout]) -> None:
        """Metrics of what was sampled, whatever of it is learned from."""
        scores = [rollout.reward for rollout in rollouts if rollout.score.value is not None]
        kept, functions = sum(len(item.completions) for item in self.rows.items if _is_learned(item)), by_function(rollouts)
        self.run.window.add({
            WITHOUT_SCORE: (len(rollouts) - len(scores), len(rollouts)), "samples/reward": (sum(scores), len(scores)),
            "samples/kept": (kept, len(rollouts)), "samples/cut": (_num_cut(rollouts), len(rollouts)),
            **{f"samples/function/{name}": total for name, total in functions.items()},
            **{f"samples/function/{name}/applies": (count, len(scores)) for name, (_, count) in functions.items()},
        })  # fmt: skip

    def _warn_of_labels(self) -> None:
        line = feedback.all_desirable(self._made, self.online.feedback.threshold)
        if line and not self._all_desirable:
            self._all_desirable = True
            log.warning("step %d: %s", self.run.step, line)

    def _rescore(self, rollouts: Sequence[Rollout]) -> None:
        """Metrics of a few samples: how far the sampler's log-probs are from the policy's own."""
        some = rescore.evenly([rollout.sample for rollout in rollouts], self.online.rescore)
        if not some:
            return
        prompts = [tuple(map(int, sample.prompt.ids)) for sample in some]
        differences = rescore.differences(some, prompts, self.engine.own_logps)
        mean, largest = float(differences.mean()), float(differences.max())
        self.run.window.add({"mismatch/mean": (mean, 1.0), LARGEST_DIFFERENCE: (largest, 1.0)})
        if mean > (bound := rescore.warned_above(self.online.sampler)) and not self._mismatched:
            self._mismatched = True
            log.warning("step %d: %s", self.run.step, rescore.warning(mean, largest, len(some), bound))

    def evaluate(self) -> dict[str, float]:
        """Generation evaluation: answer the evaluation prompts. The same metrics on every rank."""
        seconds = dict[str, float]()
        rollouts = self._collect(self.prompts.evaluation, 0, seconds)
        metrics = evaluation.metrics_of(rollouts, self.online)
        if self.run.main and self.online.show:
            examples = measure.examples(rollouts, self.online.show)
            self._write_examples(examples, metrics)
            rows = [rollout.shown() for rollout in examples]
            for hook in self.run.hooks.values():
                hook.on_examples(self.run, rows)
        if "reward" not in metrics:
            raise ScoringError(f"evaluation: {lack([rollout.score for rollout in rollouts])}")
        spent = {f"{SECONDS}{name}": round(value, 3) for name, value in seconds.items()}
        return {**metrics, **function_metrics(rollouts), "examples": len(rollouts), **spent}

    def _collect(self, prompts: Sequence[Prompt], seed: int, seconds: dict[str, float]) -> list[Rollout]:
        rollouts = collect(self.prompts.requests(prompts, seed), self.engine.opened, self.scorer, self.ranks, seconds)
        if (line := lack([rollout.score for rollout in rollouts])) and not self._warned:
            self._warned = True
            log.warning("step %d: %s. They are left out, and the metric %s counts them", self.run.step, line, WITHOUT_SCORE)
        return rollouts

    def _write_examples(self, rollouts: Sequence[Rollout], metrics: Mapping[str, float]) -> None:
        """Write samples.md; on a full disk warn, and let the run continue."""
        try:
            title = f"{self.config.exp_name}, step {self.run.step}"
            measure.write_examples(self.run.directory.path, rollouts, title, evaluation.summary(metrics))
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            log.warning("samples.md could not be written: %s", error)

    def _fill(self, number: int, rollouts: Sequence[Rollout], *, drop_equal: bool | None = None) -> int:
        """Make rows of the rollouts; return how many prompts' worth there are."""
        settings = self.online.feedback if drop_equal is None else replace(self.online.feedback, drop_equal=drop_equal)
        result, self._made = feedback.make(rollouts, settings, kind=self.loss.inputs.feedback,
                                           seed=self.config.seed, truncated=self.online.truncated)  # fmt: skip
        numbers = {name: number for number, name in enumerate(dict.fromkeys(rollout.prompt.id for rollout in rollouts))}
        usable = usable_feedback(result, self.rows.kind)
        items = [_item(each, f"{each.prompt_id}#{row}") for row, each in enumerate(usable)]
        self.rows.fill(number, items, np.array([numbers[each.prompt_id] for each in usable], np.int64))
        return -(-len(items) // self.prompts.per_prompt) if any(map(_is_learned, items)) else 0


def usable_feedback(given: Sequence[feedback.Feedback], kind: type[Example]) -> list[feedback.Feedback]:
    """The feedback from which examples of a kind can be made: undesirable completions are no demonstrations."""
    return [each for each in given if kind is not Demonstration or not isinstance(each, feedback.Label) or each.desirable]


def _item(each: feedback.Feedback, name: str) -> Item:
    """An item of the trainer's data."""
    match each:
        case feedback.Pair(chosen=chosen, rejected=rejected, margin=margin):
            both = (_completion(chosen.sample), _completion(rejected.sample))
            return Item(_prompt(chosen), both, name, {"margin": margin or 0.0})
        case feedback.Label(rollout, desirable):
            return Item(_prompt(rollout), (_completion(rollout.sample),), name, {"desirable": float(desirable)})
        case feedback.Reward(rollout, masked):
            logps = None if masked else np.array(rollout.sample.logps, np.float32)
            completion = _completion(rollout.sample, scored=not masked)
            return Item(_prompt(rollout), (completion,), name, {"reward": rollout.reward}, logps)


def _prompt(rollout: Rollout) -> np.ndarray:
    return np.array(rollout.prompt.ids, np.int32)


def _completion(sample: Sample, *, scored: bool = True) -> Completion:
    ids = np.array(sample.ids, np.int32)
    return Completion(ids, np.full(len(ids), scored))


def _num_cut(rollouts: Sequence[Rollout]) -> int:
    return sum(feedback.is_cut(rollout.sample) for rollout in rollouts)


def _is_learned(item: Item) -> bool:
    return any(each.scored.any() for each in item.completions)
