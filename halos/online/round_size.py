"""The size of a round: how many prompts it samples, and how many optimizer steps its training takes on their samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from halos.config.bind import LossSpec
from halos.config.schema import Config, Online
from halos.errors import UserError
from halos.rollout import feedback

MANY_STEPS = 64  # on one set of samples: beyond these a warning says that most are far from the policy that sampled


@dataclass(frozen=True, slots=True)
class RoundSize:
    """Of a round whose samples all have a score, and of whose groups none is left out; others are smaller."""

    prompts: int
    steps: int

    @classmethod
    def of(cls, online: Online, inner: Config, loss: LossSpec, kind: str, *, available: int, length_is_set: bool) -> RoundSize:
        """`inner` is the configuration of a round's training, `kind` the feedback it learns from, and `available` the number of
        prompts; `length_is_set` tells that its train.steps or train.epochs were given. Raises UserError."""
        typed_steps = inner.train.steps if length_is_set else None
        passes = 1.0 if typed_steps is not None else inner.train.epochs or 1.0
        per_step = prompts_per_step(online, inner, loss, kind)
        batches = max(1, round((typed_steps or online.steps_per_round) / passes))
        prompts = min(online.prompts_per_round or math.ceil(batches * per_step), available)
        return cls(prompts, typed_steps or math.ceil(passes * math.ceil(prompts / per_step)))


def prompts_per_step(online: Online, inner: Config, loss: LossSpec, kind: str) -> float:
    """How many prompts give the items of one optimizer step. Raises UserError where a batch cannot hold the samples of one."""
    samples, example = online.samples_per_prompt, loss.example_type or loss.inputs.example
    made = feedback.rows_per_prompt(kind, samples, online.feedback.pairing, by_verdict=online.scorer.pairwise)
    each = made * max(1, len(example.of(feedback.made_up(kind)) or ()))  # a pair is two labels, for one
    size = inner.train.batch_size
    if not loss.on_rollouts:
        return size / max(1, each)
    if size < each:
        raise UserError(f"train.batch_size={size} completions cannot hold the {each} samples of one prompt")
    return size // each  # a batch holds whole groups
