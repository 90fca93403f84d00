"""What a run trains on: rows of a data set, or what its own policy says at every step."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from halos.config.bind import LossSpec
from halos.config.schema import Config
from halos.data.dataset import Dataset
from halos.distributed.launch import agree
from halos.errors import UserError
from halos.hooks.base import Run
from halos.online.live import Live, Prompts
from halos.run import datasets
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

    def lines(self) -> list[tuple[str, str]]:
        """What became of the data, for people: which split, and a line."""
        ...

    def open(self, run: Run, skeleton: Callable[[], nn.Module]) -> Opened: ...


def feed(config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, made: Accelerator) -> Feed:
    """Raises UserError for every mistake in the data."""
    kind = FromFiles if config.online is None else FromPolicy
    return kind(config, loss, tokenizer, made)


class FromFiles:
    """Rows of files."""

    def __init__(self, config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, made: Accelerator) -> None:
        self.train, self.held_out = datasets.load(config, loss, tokenizer, made)
        assert isinstance(self.train.rows, Dataset)
        self.order = datasets.order(self.train.rows, loss, config)
        self.total = config.train.steps or math.ceil((config.train.epochs or 0) * self.order.batches_per_epoch)

    def lines(self) -> list[tuple[str, str]]:
        splits = (("train", self.train), ("held out", self.held_out))
        return [(name, line) for name, split in splits for line in (split.rows.lines() if split else [])]

    def open(self, run: Run, skeleton: Callable[[], nn.Module]) -> Opened:
        return Opened(self.train, self.held_out, self.order)


class FromPolicy:
    """Completions of the policy in training."""

    def __init__(self, config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, made: Accelerator) -> None:
        if loss.statistics_inputs is Mismatched:
            raise UserError(
                f"online.steps: {loss.name} pairs each prompt with another's answer, for which it needs online.rounds"
            )
        if loss.example_type is not None:
            raise UserError(f"online.steps: {loss.name} rewrites rows of a data set: it cannot be trained live")
        self.prompts = Prompts(config, tokenizer, datasets.KINDS[loss.inputs])
        self.total = config.train.steps or 0
        asked = [[row["prompt_id"], row["prompt"]] for row in (*self.prompts.train, *self.prompts.exam)]
        agree(made, "prompts (by their hash)", hashlib.sha256(json.dumps(asked).encode()).hexdigest())

    def lines(self) -> list[tuple[str, str]]:
        return [("prompts", self.prompts.line)]

    def open(self, run: Run, skeleton: Callable[[], nn.Module]) -> Opened:
        source = Live(run, self.prompts, skeleton)
        return Opened(Split(source.rows, None), None, source, source.exam if self.prompts.exam else None)
