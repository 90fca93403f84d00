"""What a run trains on: rows of a data set, or what its own policy says at every step."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Protocol

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from halos.config.bind import LossSpec
from halos.config.schema import Config
from halos.data.dataset import Dataset
from halos.distributed.launch import require_same_on_all_ranks
from halos.errors import UserError
from halos.hooks.base import Run
from halos.online.live import LivePrompts, RolloutSource
from halos.online.policy import server_of
from halos.online.unsharded import Unsharded
from halos.rollout import feedback
from halos.rollout.prompts import digest
from halos.rollout.scorers.scorer import refuse_unscorable, scorer_of
from halos.run import datasets
from halos.run.shown import rendered, visible
from halos.rundir import RunDir
from halos.trainers.base import Batches, Exam
from halos.trainers.deal import Split
from halos.types import Mismatched


@dataclass(frozen=True, slots=True)
class Opened:
    """What a trainer is given."""

    train: Split
    held_out: Split | None
    order: Batches
    exam: Exam | None = None


class Feed(Protocol):
    """Read and checked before any model loads, and opened when the run stands."""

    total: int  # steps
    splits: list[tuple[str, Split]]  # what is on disk, by its name in the header
    unmeasured: frozenset[str]  # metrics that the held-out rows cannot give

    def lines(self) -> list[tuple[str, str]]:
        """What became of the data, for people: which split, and a line."""
        ...

    def first_row(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        """The first one as the model is to see it: what each part is, and its text."""
        ...

    def contents(self) -> dict[str, str | None]:
        """Hashes of what is trained on and evaluated with, by the keys that name it."""
        ...

    def tokens_until(self, step: int) -> int | None:
        """Of the rows of all steps before it; None where that is not known beforehand."""
        ...

    def open(self, run: Run, policy: Unsharded) -> Opened: ...


def feed(config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, made: Accelerator, max_length: int) -> Feed:
    """Raises UserError for every mistake in the data."""
    kind = FromFiles if config.online is None else FromPolicy
    return kind(config, loss, tokenizer, made, max_length)


class FromFiles:
    """Rows of files."""

    def __init__(
        self, config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, made: Accelerator, max_length: int
    ) -> None:
        self.train, self.held_out = datasets.load(config, loss, tokenizer, made, max_length)
        assert isinstance(self.train.rows, Dataset)
        self.completed = loss.inputs.example.completed
        self.order = datasets.order(self.train.rows, loss, config)
        self.total = config.train.steps or math.ceil((config.train.epochs or 0) * self.order.batches_per_epoch)

        self.unmeasured = datasets.unmeasured(config, loss, self.held_out)
        self.splits = [("train", self.train)] + ([("held out", self.held_out)] if self.held_out else [])

    def lines(self) -> list[tuple[str, str]]:
        return [(name, line) for name, split in self.splits for line in split.rows.lines()]

    def first_row(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        return rendered(self.train.rows[0], self.completed, tokenizer)

    def contents(self) -> dict[str, str | None]:
        rows = (self.train.rows, self.held_out.rows if self.held_out else None)
        return {key: each.content if isinstance(each, Dataset) else None
                for key, each in zip(("data.train", "data.eval"), rows, strict=True)}  # fmt: skip

    def tokens_until(self, step: int) -> int:
        return sum(int(self.train.rows.lengths[self.order.batch(number)].sum()) for number in range(step))

    def open(self, run: Run, policy: Unsharded) -> Opened:
        return Opened(self.train, self.held_out, self.order)


class FromPolicy:
    """Completions of the policy in training."""

    def __init__(
        self, config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, made: Accelerator, max_length: int
    ) -> None:
        assert config.online is not None
        if loss.statistics_inputs is Mismatched:
            raise UserError(
                f"online.steps: {loss.name} pairs each prompt with another's answer, for which it needs online.rounds"
            )
        if loss.example_type is not None:
            raise UserError(f"online.steps: {loss.name} rewrites rows of a data set: it cannot be trained live")
        refuse_unfit_for_live(loss)
        if config.online.samples_per_prompt == 1 and loss.on_rollouts and not datasets.learns_from_single(loss):
            raise UserError(f"online.samples_per_prompt=1: {loss.name} compares samples of one prompt: 2 or more")
        if config.online.scorer.pairwise:
            raise UserError("online.scorer.pairwise is of rounds: a live loop needs scores")
        self.splits: list[tuple[str, Split]] = []
        self.unmeasured: frozenset[str] = frozenset()
        self.loss = loss
        self.scorer = scorer_of(config, RunDir(config.run_dir).path / f"judge.{made.process_index}.jsonl")
        self.server = server_of(config, tokenizer)
        self.prompts = LivePrompts(config, tokenizer, loss, max_length)
        refuse_unscorable(config, self.prompts.train)
        self.total = config.train.steps or 0
        asked = [[prompt.id, prompt.turns] for prompt in (*self.prompts.train, *self.prompts.held_out)]
        require_same_on_all_ranks(made, "prompts (by their hash)", hashlib.sha256(json.dumps(asked).encode()).hexdigest())

    def lines(self) -> list[tuple[str, str]]:
        return [("prompts", self.prompts.line)]

    def first_row(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        return [("prompt", visible(tokenizer, [int(token) for token in self.prompts.train[0].ids]))]

    def contents(self) -> dict[str, str | None]:
        return {
            "data.train": digest(self.prompts.train),
            "data.eval": digest(self.prompts.held_out) if self.prompts.held_out else None,
        }

    def tokens_until(self, step: int) -> None:
        return None

    def open(self, run: Run, policy: Unsharded) -> Opened:
        source = RolloutSource(run, self.loss, self.prompts, self.scorer, self.server, policy)
        return Opened(Split(source.rows, None), None, source, source.exam if self.prompts.held_out else None)


def refuse_unfit_for_live(loss: LossSpec) -> None:
    """Raises UserError where a loss learns from examples that scored samples alone do not make."""
    example, sampled = loss.inputs.example, feedback.EXAMPLES[loss.inputs.feedback]
    if len(example.completed) != len(sampled.completed) or not set(example.labels) <= set(sampled.labels):
        raise UserError(
            f"online.steps: {loss.name} learns from {example.__name__}, and a live loop makes {sampled.__name__} of its samples:"
            f" it needs online.rounds, where {example.__name__}.of may convert them"
        )
