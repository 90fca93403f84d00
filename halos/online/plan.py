"""What a walk of online rounds is made of: its configuration and that of each round's training, the prompts, and who is where."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos.checkpoint.select import checkpoints
from halos.config.bind import LossSpec
from halos.config.resume_policy import value_at
from halos.config.schema import Config, Online, path_keys
from halos.config.values import quoted
from halos.data.custom_format import entries_of
from halos.data.tokenize import Encoder
from halos.errors import UserError
from halos.hooks import kl
from halos.online.stages import Stages, config_file
from halos.rollout import feedback
from halos.rollout.prompts import fitting, read_prompts
from halos.rollout.scorers.scorer import refuse_unscorable, scorer_of
from halos.rollout.types import Prompt
from halos.rundir import RunDir


@dataclass
class Plan:
    """`inner` is the configuration of a round's training, `overrides` what is typed for it, and `loss` its loss."""

    config: Config
    inner: Config
    overrides: list[str]
    loss: LossSpec
    prompts: list[Prompt] = field(default_factory=list)
    held_out: list[Prompt] = field(default_factory=list)  # held-out ones
    max_length: int = 0  # tokens of a row: train.max_length, or the model's positions where they are fewer

    def __post_init__(self) -> None:
        assert self.config.online is not None
        self.online: Online = self.config.online
        self.directory, self.stages = RunDir(self.config.run_dir), Stages(self.config)
        # what may be imported is typed on this command, and never read from a saved run
        self.overrides = [self._located(word) for word in self.overrides if not word.lstrip("+").startswith("plugins=")]
        self.overrides += [f"plugins=[{','.join(self.config.plugins)}]"] if self.config.plugins else []

    def _located(self, word: str) -> str:
        """A path as it leads to the same from any directory: the rounds may be gone on with from another."""
        key = word.lstrip("+").partition("=")[0]
        path = value_at(asdict(self.inner), key) if key in path_keys() else None
        return f"{key}={quoted(path)}" if isinstance(path, str) else word

    @property
    def kind(self) -> str:
        """Of feedback, which the loss learns from."""
        kind = self.online.feedback.kind
        return kind if kind != "auto" else self.loss.inputs.feedback

    @property
    def settings(self) -> dict[str, Any]:
        """The whole as one configuration: what each round trains, under the workflow's own name and data."""
        whole = asdict(self.config)
        own = {name: whole[name] for name in ("online", "data", "objective", "hooks", "exp_name", "output_root", "run_dir")}
        settings = {**asdict(self.inner), **own}
        settings["train"]["steps"] = settings["train"]["steps"] if self._length_is_typed else None
        return settings

    @property
    def _length_is_typed(self) -> bool:
        return any(word.lstrip("+").startswith(("train.steps=", "train.epochs=")) for word in self.overrides)

    def directory_of(self, number: int) -> Path:
        return self.directory.path / "rounds" / f"{number:03d}"

    @property
    def cache(self) -> Path:
        return Path(self.config.cache_dir).expanduser()

    @property
    def start(self) -> str:
        """The first policy."""
        assert self.config.model.name_or_path is not None
        return self.config.model.name_or_path

    def policy(self, number: int) -> str:
        """What round `number` samples from, and its training goes on from."""
        return self.start if number == 0 else str(self.directory_of(number - 1) / "train" / "FINAL")

    def revision(self, number: int) -> str | None:
        """Of that policy, where it is a hub's."""
        return self.config.model.revision if number == 0 else None

    # --- before anything starts ------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read the prompts. Raises UserError for what could not work, before a stage finds it out."""
        online = self.online
        scorer_of(self.config, Path(os.devnull))
        if online.scorer.pairwise and (online.scorer.name != "judge" or self.kind != feedback.PAIRWISE):
            raise UserError("online.scorer.pairwise=true is of a judge, and of losses that learn from pairs, such as dpo")
        config_file(online) if online.config_file or self.stages.processes > 1 else None
        if online.samples_per_prompt < 2 and self.kind == feedback.PAIRWISE:
            raise UserError(
                f"online.samples_per_prompt={online.samples_per_prompt}: online.loss={online.loss} learns from pairs: 2 or more"
            )
        if self.inner.peft.name == "lora" and self.inner.peft.init_from is not None:
            raise UserError(
                "peft.init_from: rounds sample from a whole model before they train, so give the merged one"
                " (model.name_or_path=RUN/FINAL, or python -m halos.checkpoint merge)"
            )
        feedback.check_threshold(self.kind, online.feedback.threshold)
        self.prompts = read_prompts(entries_of(self.config.data, "train"), "train")
        held_out = entries_of(self.config.data, "eval") if online.eval_prompts else []
        self.held_out = read_prompts(held_out, "eval") if held_out else []
        if not self.prompts:
            raise UserError("data.train has no prompts")
        refuse_unscorable(self.config, self.prompts)

    def first_that_fits(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
        """A prompt's tokens, which leave room for an answer. Raises UserError where none does."""
        new, encoder = self.online.sampler.max_new_tokens, Encoder(tokenizer, max_length=2**31, truncation="drop")
        self.max_length = max_length
        for start in range(0, len(self.prompts), 256):
            if fit := fitting(self.prompts[start : start + 256], encoder, max_length - new):
                return [int(token) for token in fit[0].ids]
        raise UserError(
            f"no prompt of data.train leaves room for online.sampler.max_new_tokens={new} within the {max_length} tokens of a row"
            " (train.max_length): lower the one or raise the other"
        )

    # --- what a round's training is given --------------------------------------------------------------------------------

    def overrides_of(self, number: int) -> list[str]:
        """What is typed for the training of a round."""
        config, inner, online, directory = self.config, self.inner, self.online, self.directory_of(number)
        overrides = [
            *self.overrides, f"data.train=[{quoted(directory / 'feedback.jsonl')}]", "data.eval=[]",
            f"run_dir={quoted(directory / 'train')}", f"exp_name={quoted(f'{config.exp_name}-{number:03d}')}",
            f"seed={config.seed + number}", "resume=auto", f"cache_dir={quoted(config.cache_dir)}",
        ]  # fmt: skip
        if not self._length_is_typed:
            overrides.append("train.steps=null")  # a bundled model's own number is for whole data sets
        if self.loss.on_rollouts:
            overrides.append(f"train.temperature={online.sampler.temperature}")
        if online.carry_optimizer:
            overrides.append("checkpoint.at_end=true")
        if number:
            overrides += self._going_on(self.directory_of(number - 1) / "train", lora=inner.peft.name == "lora")
        return overrides

    def _going_on(self, before: Path, *, lora: bool) -> list[str]:
        """From the last round's policy; the reference stays at the start unless told otherwise."""
        overrides, last = [], self.online.reference == "last"
        if lora:
            overrides += [
                f"peft.init_from={quoted(before / 'FINAL' / 'adapter')}",
                f"reference.adapter={'start' if last else 'off'}",
            ]
            other = None  # no second copy: the reference is the policy as the round began, or its base, which is the start
        else:
            overrides += [f"model.name_or_path={quoted(before / 'FINAL')}"]
            other = None if last else self.start
        if self.loss.needs_reference and other is not None:
            overrides += [f"reference.name_or_path={quoted(other)}"]
            if str(other) == self.start and self.config.model.revision is not None:
                overrides += [f"reference.revision={quoted(self.config.model.revision)}"]
        if self.online.carry_optimizer:
            overrides += [f"optim.init_from={quoted(_last_checkpoint(before))}"]
        if (weight := self._kl_weight(before)) is not None:
            overrides += [f"loss.kl_coefficient={weight}"]
        return overrides

    def _kl_weight(self, before: Path) -> float | None:
        """Of a KL that follows a target: where the last round has left it."""
        if self.loss.adapt is None or self.loss.settings.get("kl_target") is None:
            return None
        if (left := kl.coefficient_in(before / "FINAL")) is not None:
            return left
        rows = [row for row in RunDir(before).read_metrics() if row.get("kl_coefficient") is not None]  # of an older version
        return float(rows[-1]["kl_coefficient"]) if rows else None


def _last_checkpoint(run: Path) -> Path:
    """Of a round's training, whose optimizer the next one goes on with. Raises UserError where there is none."""
    saves = checkpoints(run / "checkpoints")
    if not saves:
        raise UserError(
            f"online.carry_optimizer: {run / 'checkpoints'} holds no checkpoint whose optimizer could be handed on. Bring it"
            " back, or go on without: online.carry_optimizer=false resume_changes=allow"
        )
    return saves[-1]
