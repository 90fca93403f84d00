"""Reject settings that are valid one by one and contradict each other; each check returns its message, or None."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from halos.config import checkpoint_checks, defaults, idle_online, renamed_keys, stream_checks
from halos.config.overrides import typed_keys
from halos.config.reference_checks import LossTraits, check_reference
from halos.config.rollout_modules import engine_class, scorer_class
from halos.config.run_config import ADDED_KEYS
from halos.config.schema import Config, Scorer
from halos.errors import UserError
from halos.examples import Demonstration
from halos.reward_kind import RewardKind

BETTER_LOW = ("loss", "nll", "perplexity", "kl", "router_aux_loss", "value/loss")  # metrics
AMOUNTS = ("weight", "count", "epochs")  # of an entry of data.train
EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "tok_embeddings")


def check_combinations(config: Config, overrides: Sequence[str]) -> None:
    """Raises UserError with the first message."""
    complaints = (
        _exp_name(config),
        _duration(config, overrides),
        _batch(config),
        _peft(config, overrides),
        _quantize(config),
        _tokens(config),
        _evaluation(config),
        _objective(config, overrides),
        _idle_evaluation(config, overrides),
        checkpoint_checks.complaint(config, overrides),
        _loraplus(config),
        _lr_by_name(config),
        _reference_revision(config),
        _resume_changes(config),
        _online(config, overrides),
        _idle_correction(config, overrides),
        stream_checks.complaint(config, overrides),
    )
    for complaint in complaints:
        if complaint:
            raise UserError(complaint)


def _idle_correction(config: Config, overrides: Sequence[str]) -> str | None:
    """Bounds of a correction that is none; values that act as none are no mistake, which online runs pass on to their rounds."""
    for name, section in (("train", config.train), ("online", config.online)):
        if section is None or section.correction != "none" or config.resume is not None:
            continue
        typed = [key.partition(".")[2] for key in typed_keys(overrides) if key.startswith(f"{name}.correction_")]
        if idle := [key for key in typed if getattr(section, key) != ADDED_KEYS[name, key]]:
            return f"{name}.{idle[0]} has no effect with {name}.correction=none: leave it out"
    return None


def check_loss_traits(config: Config, loss: LossTraits, overrides: Sequence[str]) -> None:
    """Raises UserError for settings that this loss does not read, or that do not fit it."""
    check_reference(config, loss, overrides)
    typed = [key for key in typed_keys(overrides) if key.partition(".")[2].startswith("correction")]
    if typed and not loss.on_rollouts:
        raise UserError(f"{typed[0]} weighs the advantages of a policy gradient, and loss={loss.name} has none: leave it out")
    if "data.score" in typed_keys(overrides) and config.data.score != "last" and config.online is None and config.resume is None:
        example = loss.example_type or loss.inputs.example
        if example.of(Demonstration((), ({"role": "assistant", "content": "an answer"},))) is None:
            raise UserError(
                f"data.score={config.data.score} is of conversations (messages), and loss={loss.name} learns from"
                f" {example.columns or example.__name__}: leave it out"
            )
    if RewardKind.of(loss.inputs.head) and config.train.temperature != 1 and config.resume is None:
        raise UserError(
            f"train.temperature has no effect with loss={loss.name}, which gives scores and no log-probs: leave it out"
        )
    level = (config.online or config.train).correction_level
    if loss.ratio_level == "sequence" and level == "token":
        raise UserError(
            f"correction_level=token: loss={loss.name} has one ratio for a whole completion, and so has its correction:"
            " leave it out, or choose sequence"
        )
    if complaint := checkpoint_checks.watches_rewards_of_data(config, loss):
        raise UserError(complaint)


def _exp_name(config: Config) -> str | None:
    name = config.exp_name or ""
    if name and name == name.strip() and name[0] not in ".-" and not set(name) & set("/\\\n\r\t\0") and len(name) <= 200:
        return None
    return f"exp_name names a directory, so it cannot be {name!r}: use letters, digits, - and _; output_root= is its parent"


def _duration(config: Config, overrides: Sequence[str]) -> str | None:
    steps, epochs = config.train.steps, config.train.epochs
    if steps is None and epochs is None:
        return "train.steps and train.epochs are both null: give one, for example train.steps=100"
    both = steps is not None and epochs is not None and {"train.steps", "train.epochs"} <= {*typed_keys(overrides)}
    if both and config.resume is None:
        return f"train.steps={steps} and train.epochs={epochs:g} are two lengths of one run: give one of them"
    return None


def _batch(config: Config) -> str | None:
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if config.train.batch_size < world_size:
        return (
            f"train.batch_size is {config.train.batch_size}, for all {world_size} processes together:"
            f" use train.batch_size={world_size} or more, or fewer processes"
        )
    return None


def _peft(config: Config, overrides: Sequence[str]) -> str | None:
    idle = [key for key in typed_keys(overrides) if key.startswith("peft.") and key != "peft.name"]
    if config.peft.name == "none" and idle:
        return f"{idle[0]} has no effect with peft=none: add peft=lora, or leave it out"
    typed, dtype = typed_keys(overrides), config.checkpoint.get("merge_dtype")
    if config.peft.name == "none" and config.resume is None:
        if "reference.adapter" in typed:
            return "reference.adapter has no effect with peft=none, which has no adapter: add peft=lora, or leave it out"
        if "checkpoint.merge_dtype" in typed and dtype != "auto":
            return (
                f"checkpoint.merge_dtype={dtype} is of merged weights, and with peft=none nothing is merged: leave it out;"
                f" afterwards, python -m halos.checkpoint export RUN --output DIR --dtype {dtype} converts"
            )
    wrong = next((name for name, alpha in config.peft.alpha_pattern.items() if not 0 < alpha < math.inf), None)
    if wrong and config.resume is None:
        return f"peft.alpha_pattern.{wrong} takes a number (above 0), not {config.peft.alpha_pattern[wrong]:g}"
    for key in ("lora_dropout", "use_dora"):
        value = getattr(config.peft, key)
        if config.peft.name != "none" and config.peft.target_parameters and value:
            return (
                f"peft.{key}={value} applies to layers, and peft.target_parameters names parameters, for which PEFT has neither"
                f" dropout nor DoRA: leave one of the two out"
            )
    return None


def _quantize(config: Config) -> str | None:
    if config.model.quantize is None:
        return None
    if config.peft.name == "none":
        return f"model.quantize={config.model.quantize} freezes the weights, so nothing would be trained: add peft=lora"
    if find_spec("bitsandbytes") is None:
        return f"model.quantize={config.model.quantize} needs the package bitsandbytes: pip install bitsandbytes"
    return None


def _tokens(config: Config) -> str | None:
    if config.peft.name == "none" or not config.model.add_tokens:
        return None
    if any(name in module for module in config.peft.modules_to_save for name in EMBEDDINGS):
        return None
    return (
        f"model.add_tokens adds {', '.join(config.model.add_tokens)} to an embedding and a head that LoRA leaves frozen:"
        " add 'peft.modules_to_save=[embed_tokens,lm_head]' (embed_in and embed_out for pythia; the first alone where they are in"
        " prompts only), or train with peft=none"
    )


def _evaluation(config: Config) -> str | None:
    patience = config.train.early_stopping
    if not config.data.has_eval and (key := checkpoint_checks.watching(config)):
        return f"{key} watches {config.objective.metric} of the evaluation, but data.eval is []: give data.eval, or leave it out"
    if patience and config.train.eval_every is None:
        return f"train.early_stopping={patience} counts evaluations, but train.eval_every is null: give it a number of steps"
    return None


def _objective(config: Config, overrides: Sequence[str]) -> str | None:
    """A metric chosen by name alone would keep the direction of the loss's own."""
    metric, typed = config.objective.metric, typed_keys(overrides)
    chosen = "objective.metric" in typed and "objective.mode" not in typed
    parts = metric.split("/")  # of one source it has the name of that before it
    better_low = any("/".join(parts[start:]) in BETTER_LOW for start in range(len(parts)))
    if config.objective.mode == "max" and better_low and (chosen or metric == "loss"):
        return f"objective.metric={metric} is better low, and objective.mode is max: add objective.mode=min"
    if config.objective.mode == "min" and chosen and not better_low:
        return f"objective.metric={metric} would be minimised, as this loss's own: add objective.mode=max, or min to say so"
    return None


def _idle_evaluation(config: Config, overrides: Sequence[str]) -> str | None:
    """Settings of the evaluation that would never act in this run."""
    typed, train = typed_keys(overrides), config.train
    if config.data.eval_fraction is None and "data.near_duplicates" in typed and config.resume is None:
        return "data.near_duplicates is of prompts that are held out: it has no effect without data.eval_fraction"
    if amount := _amount(config.data.eval, config):
        return f"data.eval: {amount} has no effect, since an evaluation takes every row once: leave it out"
    patience = train.early_stopping
    if patience is not None and "train.early_stopping" in typed and train.eval_every and train.steps:
        before_end = train.eval_at_start + (train.steps - 1) // train.eval_every
        if before_end <= patience:
            return (
                f"train.early_stopping={patience} acts at evaluation {patience + 1} or later, and train.eval_every="
                f"{train.eval_every} gives {before_end} before the end of train.steps={train.steps}: lower train.eval_every,"
                " or leave it out"
            )
    return None


def _amount(entries: Sequence[Any], config: Config) -> str | None:
    """Return the first weight, count or number of epochs of entries of data, where the run is new."""
    mappings = [entry for entry in entries if isinstance(entry, dict)] if config.resume is None else []
    given = ((name, entry[name]) for entry in mappings for name in AMOUNTS if entry.get(name) is not None)
    return next((f"{name}={value}" for name, value in given), None)


def _loraplus(config: Config) -> str | None:
    ratio = config.optim.get("loraplus_lr_ratio")
    if ratio is not None and config.peft.name != "lora":
        return f"optim.loraplus_lr_ratio={ratio:g} applies to LoRA's B matrices: add peft=lora, or leave it out"
    return None


def _lr_by_name(config: Config) -> str | None:
    for pattern, lr in (config.optim.get("lr_by_name") or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            return f"optim.lr_by_name: {pattern!r} is no regular expression: {error}"
        if not 0 <= lr < math.inf:
            return f"optim.lr_by_name: the learning rate of {pattern!r} must be a number from 0 up, not {lr}"
    return None


def _reference_revision(config: Config) -> str | None:
    reference = config.reference
    if reference.revision is not None and reference.name_or_path is None and config.resume is None:
        return f"reference.revision={reference.revision} has no effect without reference.name_or_path: give both, or neither"
    return None


def _resume_changes(config: Config) -> str | None:
    if config.resume is None and config.resume_changes != "refuse":
        return f"resume_changes={config.resume_changes} has no effect without resume=: leave it out"
    return None


def _online(config: Config, overrides: Sequence[str]) -> str | None:
    online = config.online
    if online is None:
        return None
    if (named := config.reference.name_or_path) and (online.reference == "last" or "online.reference" in typed_keys(overrides)):
        return f"online.reference={online.reference} and reference.name_or_path={named} are two references: leave out one"
    if online.steps is not None and "online.rounds" in typed_keys(overrides):
        return "online.rounds and online.steps exclude each other: give rounds, or steps for a live loop"
    if online.steps is None and (idle := next((name for name in ("minibatches", "epochs") if getattr(online, name) > 1), None)):
        return f"online.{idle}={getattr(online, idle)} is of live loops, and a round trains for train.epochs: leave it out"
    if online.sampler.temperature == 0:
        return "online.sampler.temperature takes a number above 0, not 0: all samples of a prompt would be the same"
    if config.data.eval_fraction is not None:
        return "data.eval_fraction is of losses on a data set, and loss=online evaluates on the prompts of data.eval: give these"
    if amount := _amount(config.data.train, config):
        return f"data.train: {amount} is of rows, and loss=online takes every prompt once: leave it out"
    for key in typed_keys(overrides):
        if key.startswith("train.correction") and config.resume is None:
            return f"{key} has no effect with loss=online, where online.{key.partition('.')[2]} sets it: give that"
    sampler = online.sampler

    def spelled(name: str) -> str:
        return f"online.sampler.{name}"

    complaint = engine_class(sampler.name).problem(sampler, spelled) or idle_online.without_length(sampler, spelled)
    return complaint or idle_online.complaint(config, overrides) or _scorer(online.scorer, overrides)


def _scorer(scorer: Scorer, overrides: Sequence[str]) -> str | None:
    kind, typed = scorer_class(scorer.name), typed_keys(overrides)
    if complaint := kind.problem(scorer, lambda name: f"online.scorer.{name}"):
        return complaint
    for name in idle_scorer_keys(scorer):
        key = f"online.scorer.{name}"
        if key in map(renamed_keys.current_name, typed):
            takes = ", ".join(kind.takes) or "no keys"
            return f"{key} has no effect with online.scorer.name={scorer.name}, which takes {takes}: leave it out"
    return None


def idle_scorer_keys(scorer: Scorer) -> list[str]:
    """Return the keys that a scorer does not read and whose value is neither the default nor empty. Whether it can compare is
    asked where the loss is known too."""
    unread = [each.name for each in fields(scorer) if each.name not in ("name", "pairwise", *scorer_class(scorer.name).takes)]
    default = defaults.section(Scorer)
    return [name for name in unread if getattr(scorer, name) not in (None, [], getattr(default, name))]
