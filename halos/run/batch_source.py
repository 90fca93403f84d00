"""The training batches of a run: from a dataset, or sampled from its own policy at every step."""

import hashlib
import json
import math
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Protocol

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from halos.config.bind import LossSpec, refuse_single_samples
from halos.config.rollout_modules import scorer_class
from halos.config.schema import Config
from halos.data.dataset import Dataset
from halos.data.dates import content_entry, date_of, refuse_unwritten
from halos.data.order import GroupOrder
from halos.distributed.agreement import require_same_on_all_ranks
from halos.errors import UserError
from halos.hooks.base import Run
from halos.inspection import data_checks, template_checks
from halos.inspection.findings import Check
from halos.inspection.steps import Steps
from halos.online.live import LivePrompts, RolloutSource
from halos.online.live_rows import LivePartners
from halos.online.policy import server_of
from halos.online.unsharded import Unsharded
from halos.rollout import feedback
from halos.rollout.prompts import columns_digest, content_hashes
from halos.rollout.scorers.scorer import scorer_of
from halos.run import available_metrics, datasets
from halos.run.render import decode_visibly, render_example
from halos.rundir import RunDir
from halos.trainers.base import Batches, GenerationEvaluation
from halos.trainers.microbatches import Split
from halos.types import Mismatched


@dataclass(frozen=True, slots=True)
class TrainerData:
    """A trainer's data."""

    train: Split
    eval_data: Split | None
    order: Batches
    generation_evaluation: GenerationEvaluation | None = None


class BatchSource(Protocol):
    """Read and checked before any model loads, and opened once the model is loaded."""

    total: int  # steps
    steps_per_epoch: int | None  # of a pass over the data; None where they are sampled
    splits: list[tuple[str, Split]]  # of the datasets on disk, by their names in the header
    unmeasured: frozenset[str]  # metrics that the evaluation data cannot yield
    checks: tuple[Check, ...]  # of the data and the chat template
    known_ids: int | None  # of tokens, that the policy has embeddings for: for rows that are read while it trains
    scorer_date: str | None  # that a chat template of a scorer's writes

    def steps(self) -> Steps | None:
        """Return counts of the steps and their tokens; None where they are not known beforehand."""
        ...

    def lines(self) -> list[tuple[str, str]]:
        """Return the header's lines on the data: the name of the split, and a text."""
        ...

    def first_example(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        """Return the first example as the model gets it: the name of each part, and its text."""
        ...

    def content_hashes(self) -> dict[str, str | None]:
        """Return hashes of the training and evaluation data, by config key."""
        ...

    def tokens_until(self, step: int) -> int | None:
        """Return the number of tokens in all steps before `step`; None if it is not known beforehand."""
        ...

    def open(self, run: Run, policy: Unsharded) -> TrainerData:
        """Return the trainer's data, now that the model is loaded."""
        ...


class DatasetSource:
    """Batches of a dataset."""

    known_ids: int | None = None
    scorer_date: str | None = None

    def __init__(
        self, config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, max_length: int
    ) -> None:
        self.train, self.eval_data = datasets.load(config, loss, tokenizer, accelerator, max_length)
        assert isinstance(self.train.rows, Dataset)
        if self.eval_data is not None and isinstance(self.eval_data.rows, Dataset):
            available_metrics.refuse_empty_source(config, loss, self.eval_data.rows)
        self.completed = loss.inputs.example.completed
        self.order = datasets.order(self.train.rows, loss, config)
        self.steps_per_epoch: int | None = self.order.batches_per_epoch
        self.single = datasets.single_completions(self.train.rows, loss)
        self.total = config.train.steps or math.ceil((config.train.epochs or 0) * self.order.batches_per_epoch)
        self.mixture = datasets.mixture_lines(self.train.rows, self.order, self.total)
        self.checks = datasets.checks(self.train, self.eval_data, loss, tokenizer, config.train.temperature)
        if isinstance(self.order, GroupOrder):
            mean, size = self.order.mean_size, config.train.batch_size
            self.checks += (data_checks.of_groups(self.train.rows, self.order.largest, mean, size),)
        self.unmeasured = datasets.unavailable_metrics(config, loss, self.eval_data)
        self.splits = [("train", self.train)] + ([("held out", self.eval_data)] if self.eval_data else [])

    def steps(self) -> Steps:
        return self._steps

    @cached_property
    def _steps(self) -> Steps:
        assert isinstance(self.train.rows, Dataset)
        return Steps.of(self.train.rows, self.order, self.total)

    def lines(self) -> list[tuple[str, str]]:
        lines = [(name, line) for name, split in self.splits for line in split.rows.lines()]
        lines += [("mixture", line) for line in self.mixture]
        return [*lines, ("train", self.single)] if self.single else lines

    def first_example(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        return render_example(self.train.rows[0], self.completed, tokenizer)

    def content_hashes(self) -> dict[str, str | None]:
        rows = (self.train.rows, self.eval_data.rows if self.eval_data else None)
        return {key: each.content if isinstance(each, Dataset) else None
                for key, each in zip(("data.train", "data.eval"), rows, strict=True)}  # fmt: skip

    def tokens_until(self, step: int) -> int | None:
        return sum(int(self.train.rows.lengths[self.order.batch(number)].sum()) for number in range(step))

    def open(self, run: Run, policy: Unsharded) -> TrainerData:
        return TrainerData(self.train, self.eval_data, self.order)


class PolicySource:
    """Completions sampled from the policy in training."""

    known_ids: int | None = None

    def __init__(
        self, config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, max_length: int,
        day: date,
    ) -> None:  # fmt: skip
        assert config.online is not None
        if loss.example_type is not None:
            raise UserError(f"online.steps: {loss.name} rewrites examples of a dataset: it cannot be trained live")
        refuse_unfit_for_live(loss)
        refuse_single_samples(loss, config.online.samples_per_prompt)
        if config.online.scorer.pairwise:
            raise UserError("online.scorer.pairwise is of rounds: a live loop needs scores")
        self.splits: list[tuple[str, Split]] = []
        self.steps_per_epoch: int | None = None
        self.unmeasured: frozenset[str] = frozenset()
        self.checks = template_checks.checks_of(tokenizer)
        self.loss = loss
        name = config.online.scorer.name
        answers = f"{name}.jsonl" if scorer_class(name).is_paid else f"{name}.{accelerator.process_index}.jsonl"
        self.scorer = scorer_of(config, RunDir(config.run_dir).path / answers, day)
        self.scorer_date = self.scorer.date
        self.date = date_of(tokenizer)
        refuse_unwritten(config.data.date, self.date, self.scorer_date)
        self.server = server_of(config, tokenizer)
        self.prompts = LivePrompts(config, tokenizer, loss, max_length)
        self.scorer.check_prompts(self.prompts.train)
        self.total = config.train.steps or 0
        both = (*self.prompts.train, *self.prompts.evaluation)
        prompts = [*([prompt.id, prompt.turns] for prompt in both), columns_digest(both)]
        prompts_hash = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        require_same_on_all_ranks(accelerator, "prompts (by their hash)", prompts_hash)

    def steps(self) -> None:
        return None

    def lines(self) -> list[tuple[str, str]]:
        dated = f"{self.scorer_date}, which the scorer's chat template may write (data.date)"
        return [("prompts", self.prompts.line), *([("date", dated)] if self.scorer_date else [])]

    def first_example(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        return [("prompt", decode_visibly(tokenizer, [int(token) for token in self.prompts.train[0].ids]))]

    def prompt_ids(self, count: int) -> list[tuple[str, np.ndarray]]:
        """Return the id and the tokens of the first `count` prompts."""
        return [(prompt.id, prompt.ids) for prompt in self.prompts.train[:count]]

    def content_hashes(self) -> dict[str, str | None]:
        hashes = content_hashes(self.prompts.train, self.prompts.evaluation, self.prompts.online.scorer.name)
        return hashes | content_entry(self.date, self.scorer_date)

    def tokens_until(self, step: int) -> None:
        return None

    def open(self, run: Run, policy: Unsharded) -> TrainerData:
        source = RolloutSource(run, self.loss, self.prompts, self.scorer, self.server, policy)
        partners = LivePartners(source.rows) if self.loss.statistics_inputs is Mismatched else None
        evaluate = source.evaluate if self.prompts.evaluation else None
        return TrainerData(Split(source.rows, partners), None, source, evaluate)


def refuse_unfit_for_live(loss: LossSpec) -> None:
    """Raises UserError where a loss learns from examples that cannot be made of samples and their scores alone."""
    example, sampled = loss.inputs.example, feedback.EXAMPLES[loss.inputs.feedback]
    if len(example.completed) != len(sampled.completed) or not set(example.labels) <= set(sampled.labels):
        raise UserError(
            f"online.steps: {loss.name} learns from {example.__name__}, and a live loop makes {sampled.__name__} of its samples:"
            f" it needs online.rounds, where {example.__name__}.of may convert them"
        )
