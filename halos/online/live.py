"""A live loop: every step samples from the policy in training, and trains on those samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from halos.config.bind import LossSpec
from halos.config.schema import Config
from halos.confined import DISK_FULL
from halos.data.custom_format import entries_of
from halos.data.tokenize import Encoder
from halos.errors import UserError
from halos.examples import Completion, Demonstration, Example, Item
from halos.hooks.base import Run
from halos.online.policy import PolicyEngine
from halos.online.unsharded import Unsharded
from halos.rollout import feedback, measure
from halos.rollout.collect import collect
from halos.rollout.engines.engine import PolicyServer
from halos.rollout.prompts import eval_prompts, fitting, for_round, read_prompts
from halos.rollout.ranks import Ranks
from halos.rollout.scorers.scorer import Scorer
from halos.rollout.types import EVAL, Prompt, Request, Rollout, Sample, requests_for

log = logging.getLogger(__name__)

RETRY_OFFSET = 100_003  # in batches of prompts: where the prompts of a further attempt at a step are taken from
ATTEMPTS = 10  # the first at the step's own prompts, the others at further ones, while no sample is better than another
WITHOUT_SCORE = "samples/without_score"  # the fraction of a step's samples


class LiveRows:
    """The rows of the current step, with the interface of a Dataset; replaced at every step."""

    def __init__(self, kind: type[Example], *, sampled_here: bool) -> None:
        self.kind, self.sampled_here = kind, sampled_here  # by the model in training, in this process
        self.fill([], np.zeros(0, np.int64))

    def fill(self, items: Sequence[Item], groups: np.ndarray) -> None:
        self.items, self.groups = list(items), groups
        self.scored = np.array([[int(each.scored.sum()) for each in item.completions] for item in self.items])
        self.lengths = np.array([[len(item.prompt) + len(each.ids) for each in item.completions] for item in self.items])
        names = self.items[0].labels if self.items else ()
        self.labels: dict[str, np.ndarray] = {name: np.array([item.labels[name] for item in self.items]) for name in names}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Item:
        return self.items[row]

    def lines(self) -> list[str]:
        return ["sampled from the policy at every step"]


class LivePrompts:
    """The prompts of a live loop, read and tokenised before any model loads. Raises UserError for wrong input."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, loss: LossSpec, max_length: int) -> None:
        assert config.online is not None
        online = self.online = config.online
        _check_feedback(config, loss)
        encoder, room = Encoder(tokenizer, max_length=2**31, truncation="drop"), max_length - online.sampler.max_new_tokens
        train = read_prompts(entries_of(config.data, "train"), "train")
        evaluation = read_prompts(entries_of(config.data, "eval"), "eval") if config.data.eval and online.eval_prompts else []
        evaluation = eval_prompts(evaluation, count=online.eval_prompts, seed=config.seed)
        self.train = fitting(train, encoder, room)
        self.evaluation = fitting(evaluation, encoder, room) if evaluation else []
        if not self.train:
            raise UserError(f"no prompt leaves room for online.sampler.max_new_tokens={online.sampler.max_new_tokens} within"
                            f" {max_length} tokens (train.max_length)")  # fmt: skip
        samples = online.samples_per_prompt
        self.per_step = config.train.batch_size // samples
        if not self.per_step:
            raise UserError(
                f"train.batch_size={config.train.batch_size} completions cannot hold the {samples} samples of one prompt"
            )
        if loss.inputs.feedback == feedback.PAIRWISE and samples < 2:
            raise UserError("online.samples_per_prompt: pairs need 2 or more")
        self.line = f"{len(self.train)} prompts, {self.per_step} a step, {samples} samples of each"
        self.line += f"; {len(self.evaluation)} held out"
        if dropped := len(train) + len(evaluation) - len(self.train) - len(self.evaluation):
            self.line += f"; {dropped} prompts leave no room for an answer"

    def requests(self, prompts: Sequence[Prompt], seed: int) -> list[Request]:
        sampler = self.online.sampler
        return requests_for(prompts, samples=self.online.samples_per_prompt, temperature=sampler.temperature,
                            max_new_tokens=sampler.max_new_tokens, seed=seed)  # fmt: skip


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
    """The source of global batches: `batch(step)` samples and scores one, a shard on every rank, and every rank gets all of it.

    The samples are a function of weights, seed and step, so a resumed run continues exactly.
    """

    def __init__(
        self, run: Run, loss: LossSpec, prompts: LivePrompts, scorer: Scorer, server: PolicyServer | None,
        policy: Unsharded,
    ) -> None:  # fmt: skip
        self.run, self.loss, self.prompts, self.online, self.config = run, loss, prompts, prompts.online, run.config
        self.scorer, self.engine = scorer, PolicyEngine(run, server, policy)
        self.ranks = Ranks(run.accelerator.process_index, run.accelerator.num_processes)
        self.rows = LiveRows(loss.inputs.example, sampled_here=server is None)
        self._warned = False  # of samples without a score

    def batch(self, number: int) -> np.ndarray:
        """Sample the rows of step `number`, counted from 0; return their indices, which are all of `rows`."""
        sampled, without = 0, list[Rollout]()
        for attempt in range(ATTEMPTS):
            chosen = for_round(self.prompts.train, number + attempt * RETRY_OFFSET, count=self.prompts.per_step,
                               samples=self.online.samples_per_prompt, seed=self.config.seed)  # fmt: skip
            rollouts = self._collect(chosen, (self.config.seed * 1_000_003 + number) * ATTEMPTS + attempt)
            sampled, without = sampled + len(rollouts), [*without, *_without_score(rollouts)]
            self._fill(rollouts)
            if len(self.rows):
                self.run.window.add({WITHOUT_SCORE: (len(without), sampled)})
                return np.arange(len(self.rows))
        if len(without) == sampled:
            raise UserError(f"step {number}: none of {sampled} samples has a score: {without[0].score.problem}")
        lack = f"; {len(without)} of {sampled} had no score: {without[0].score.problem}" if without else ""
        raise UserError(
            f"step {number}: in {ATTEMPTS} batches of prompts no sample was better than another: more online.samples_per_prompt,"
            f" a higher temperature, or other prompts{lack}"
        )

    def evaluate(self) -> dict[str, float]:
        """Generation evaluation: answer the evaluation prompts greedily. The same metrics on every rank."""
        rollouts = self._collect(self.prompts.evaluation, 0)
        if self.run.main and self.online.show:
            examples = measure.examples(rollouts, self.online.show)
            self._write_examples(examples)
            rows = [rollout.shown() for rollout in examples]
            for hook in self.run.hooks.values():
                hook.on_examples(self.run, rows)
        metrics = measure.of_samples(rollouts, split=EVAL)
        if "reward" not in metrics:
            raise UserError(f"none of the {len(rollouts)} held-out answers has a score: {rollouts[0].score.problem}")
        return {**metrics, "examples": len(rollouts)}

    def _collect(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        rollouts = collect(self.prompts.requests(prompts, seed), self.engine.opened, self.scorer, self.ranks)
        if (without := _without_score(rollouts)) and not self._warned:
            self._warned = True
            log.warning("step %d: %d of %d samples have no score, and are left out: %s. The metric %s counts them",
                        self.run.step, len(without), len(rollouts), without[0].score.problem, WITHOUT_SCORE)  # fmt: skip
        return rollouts

    def _write_examples(self, rollouts: Sequence[Rollout]) -> None:
        """Write samples.md; on a full disk warn, and let the run continue."""
        try:
            measure.write_examples(self.run.directory.path, rollouts, f"{self.config.exp_name}, step {self.run.step}")
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            log.warning("samples.md could not be written: %s", error)

    def _fill(self, rollouts: Sequence[Rollout]) -> None:
        result, _ = feedback.make(rollouts, self.online.feedback, kind=self.loss.inputs.feedback, seed=self.config.seed)
        numbers = {name: number for number, name in enumerate(dict.fromkeys(rollout.prompt.id for rollout in rollouts))}
        usable = usable_feedback(result, self.rows.kind)
        items = [_item(each, f"{each.prompt_id}#{number}") for number, each in enumerate(usable)]
        self.rows.fill(items, np.array([numbers[each.prompt_id] for each in usable], np.int64))


def _without_score(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return [rollout for rollout in rollouts if rollout.score.value is None]


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
        case feedback.Reward(rollout):
            logps = np.array(rollout.sample.logps, np.float32)
            return Item(_prompt(rollout), (_completion(rollout.sample),), name, {"reward": rollout.reward}, logps)


def _prompt(rollout: Rollout) -> np.ndarray:
    return np.array(rollout.prompt.ids, np.int32)


def _completion(sample: Sample) -> Completion:
    ids = np.array(sample.ids, np.int32)
    return Completion(ids, np.ones(len(ids), bool))
