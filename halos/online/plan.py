"""The plan of an online run: its configuration and that of each round's training, the prompts, and the paths."""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos.checkpoint.select import checkpoints, step_of
from halos.config import run_config
from halos.config.bind import LossSpec, refuse_single_samples
from halos.config.reference_checks import refuse_moving_between_rounds
from halos.config.resume_policy import value_at
from halos.config.rollout_modules import engine_class, scorer_class, scorer_names
from halos.config.schema import Config, Online, path_keys
from halos.config.values import quoted, typed
from halos.data.custom_format import entries_of
from halos.data.tokenize import Encoder
from halos.errors import UserError
from halos.hooks.entropy import EntropyCoefficient
from halos.hooks.kl import KLCoefficient
from halos.online.round_size import RoundSize
from halos.online.stages import Stages, config_file
from halos.rollout import feedback
from halos.rollout.prompts import answer, fitting, read_prompts, room_for_prompts
from halos.rollout.scorers.scorer import scorer_of
from halos.rollout.types import Prompt
from halos.rundir import RunDir, is_run


@dataclass
class OnlinePlan:
    """`inner` is the configuration of a round's training, `overrides` its command-line overrides, and `loss` its loss."""

    config: Config
    inner: Config
    overrides: list[str]
    loss: LossSpec
    one_warmup: bool = False  # the rate is constant over all rounds, and warms up in the first alone
    prompts: list[Prompt] = field(default_factory=list)
    eval_prompts: list[Prompt] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)  # rows of the data that give no prompt, by why
    day: datetime.date | None = None  # of the run
    date: str | None = None  # that the policy's chat template writes in all rounds
    scorer_date: str | None = None  # that a chat template of the scorer's writes
    max_length: int = 0  # in tokens: train.max_length, or the model's number of positions where that is smaller

    def __post_init__(self) -> None:
        assert self.config.online is not None
        self.online: Online = self.config.online
        self.directory, self.stages = RunDir(self.config.run_dir), Stages(self.config)
        # plugins come from this command line, and never from a saved run, which must not decide what is imported
        own = [override for override in self.overrides if not override.lstrip("+").startswith("plugins=")]
        self.overrides = [self._from_any_directory(override) for override in own]
        self.overrides += [f"plugins=[{','.join(self.config.plugins)}]"] if self.config.plugins else []

    def _from_any_directory(self, word: str) -> str:
        """An override with its path as the configuration resolved it: the rounds may be resumed from another directory."""
        key = word.lstrip("+").partition("=")[0]
        path = value_at(asdict(self.inner), key) if key in path_keys() else None
        return f"{key}={quoted(path)}" if isinstance(path, str) else word

    @property
    def kind(self) -> str:
        """The kind of feedback that the loss learns from."""
        kind = self.online.feedback.kind
        return kind if kind != "auto" else self.loss.inputs.feedback

    @property
    def settings(self) -> dict[str, Any]:
        """One configuration for the whole: that of each round's training, with the name and data of the online run."""
        whole = asdict(self.config)
        own = {name: whole[name] for name in ("online", "data", "objective", "hooks", "exp_name", "output_root", "run_dir")}
        settings = {**asdict(self.inner), **own}
        settings["train"]["steps"] = settings["train"]["steps"] if self._length_is_set else None
        return settings

    @property
    def _length_is_set(self) -> bool:
        return self._has("train.steps") or self._has("train.epochs")

    @property
    def steps_are_set_by(self) -> str | None:
        """The key that sets the length of a round's training, where one was given."""
        return next(filter(self._has, ("train.steps", "train.epochs")), None)

    def _has(self, key: str) -> bool:
        return any(word.lstrip("+").startswith(f"{key}=") for word in self.overrides)

    @cached_property
    def size(self) -> RoundSize:
        """The size of a round. Raises UserError where train.batch_size cannot hold the samples of a prompt."""
        return RoundSize.of(self.online, self.inner, self.loss, self.kind, available=len(self.prompts),
                            length_is_set=self._length_is_set)  # fmt: skip

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
        """The policy that round `number` samples from and continues to train."""
        return self.start if number == 0 else str(self.directory_of(number - 1) / "train" / "FINAL")

    def last_policy(self, number: int) -> str | None:
        """The policy of the round before, which a user's own server may still have; None where that cannot be, is not compared,
        or its files are deleted."""
        if not number or self.online.sampler.url is None or not self.online.rescore:
            return None
        last = self.policy(number - 1)
        return last if number == 1 or Path(last).is_dir() else None

    def revision(self, number: int) -> str | None:
        """The hub revision of that policy; None for a local one."""
        return self.config.model.revision if number == 0 else None

    # --- before anything starts ------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read the prompts. Raises UserError for whatever would make a stage fail later."""
        online = self.online
        scorer = scorer_of(self.config, Path(os.devnull), self.day)
        self.scorer_date = scorer.date
        engine_class(online.sampler.name).check_ready(online.sampler)
        if online.scorer.pairwise and not (scorer.compares and self.kind == feedback.PAIRWISE):
            needed = " or a ".join(name for name in scorer_names() if scorer_class(name).compares)
            raise UserError(f"online.scorer.pairwise=true needs a {needed}, and a loss that learns from pairs, such as dpo")
        config_file(online) if online.config_file or self.stages.processes > 1 else None
        if online.samples_per_prompt < 2 and self.kind == feedback.PAIRWISE:
            raise UserError(
                f"online.samples_per_prompt={online.samples_per_prompt}: online.loss={online.loss} learns from pairs: 2 or more"
            )
        refuse_single_samples(self.loss, online.samples_per_prompt)
        if self.inner.peft.name == "lora" and self.inner.peft.init_from is not None:
            raise UserError(
                "peft.init_from: rounds sample from a full model before they train, so give the merged one"
                " (model.name_or_path=RUN/FINAL, or python -m halos.checkpoint merge)"
            )
        self._check_feedback()
        self._check_temperature()
        refuse_moving_between_rounds(self.inner, online, self.loss)
        self.prompts = read_prompts(entries_of(self.config.data, "train"), "train", unused=self.unused)
        entries = entries_of(self.config.data, "eval") if online.eval_prompts else []
        names = {prompt.id for prompt in self.prompts}
        self.eval_prompts = read_prompts(entries, "eval", others=names, unused=self.unused) if entries else []
        if not self.prompts:
            raise UserError("data.train has no prompts")
        scorer.check_prompts(self.prompts)
        assert self.size.prompts  # computed here, before anything starts
        if self.config.resume is not None and online.carry_optimizer:
            self._refuse_other_optimizer()

    def _refuse_other_optimizer(self) -> None:
        """Raises UserError where the last round was trained with another optimizer, whose state this one could not take."""
        trained = [run for number in range(self.online.rounds) if is_run(run := self.directory_of(number) / "train")]
        if not trained:
            return
        run = RunDir(trained[-1])
        before = run_config.load(run.read_config(), run.read_attempts(), str(run.path))["optim"]["_target_"]
        if before != (now := self.inner.optim["_target_"]):
            raise UserError(
                f"online.carry_optimizer: the last round was trained with optim._target_={before}, and {now} cannot go on from"
                " its state: restore it, or add online.carry_optimizer=false resume_changes=allow"
            )

    def _check_temperature(self) -> None:
        """Raises UserError for another temperature than the sampler's, which a policy gradient is trained with."""
        own, sampled = self.inner.train.temperature, self.online.sampler.temperature
        if self._has("train.temperature") and self.loss.on_rollouts and own != sampled and self.config.resume is None:
            raise UserError(
                f"train.temperature={own:g} and online.sampler.temperature={sampled:g} are one number with online.loss="
                f"{self.online.loss}: leave out train.temperature"
            )

    def _check_feedback(self) -> None:
        """Raises UserError for feedback that the loss does not learn from, and in a new run for keys that do not act on it."""
        kind, settings, example = self.kind, self.online.feedback, self.loss.inputs.example
        feedback.check_threshold(kind, settings.threshold)
        if settings.kind != "auto" and example.of(feedback.made_up(kind)) is None:
            raise UserError(
                f"online.feedback.kind={kind}: {self.online.loss} learns from {example.columns or example.__name__}: leave it out"
            )
        by_verdict = self.online.scorer.pairwise
        idle = feedback.idle_key(settings, kind, by_verdict=by_verdict, spelled=lambda name: f"online.feedback.{name}")
        if idle and self.config.resume is None:
            raise UserError(idle)

    def first_fitting_prompt(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
        """The tokens of the first prompt that leaves room for an answer. Raises UserError where none does."""
        new, encoder = self.online.sampler.max_new_tokens, Encoder(tokenizer, max_length=2**31, truncation="drop")
        self.max_length = max_length
        for start in range(0, len(self.prompts), 256):
            if fit := fitting(self.prompts[start : start + 256], encoder, room_for_prompts(new, max_length)):
                return [int(token) for token in fit[0].ids]
        raise UserError(
            f"no prompt of data.train leaves room for {answer(new)} within {max_length} tokens (train.max_length):"
            " lower the one or raise the other"
        )

    def keep_code(self, code: Callable[[], Mapping[str, str | None]]) -> None:
        """Have stages refused from now on if the user's own code, hashed by `code`, is not that of now."""
        self._code_now, self._code = code, code()

    def refuse_edited_code(self) -> None:
        """Raises UserError where the user's own code was edited after the run began: a stage, a new process, would import it."""
        now = self._code_now()
        if edited := [key for key, value in self._code.items() if now.get(key) != value]:
            raise UserError(
                f"the code of {', '.join(edited)} was edited after this run began: restore it and resume the run, or resume it"
                " with resume_changes=allow"
            )

    # --- the training of a round -----------------------------------------------------------------------------------------

    def overrides_of(self, number: int) -> list[str]:
        """The command-line overrides for the training of round `number`."""
        config, inner, online, directory = self.config, self.inner, self.online, self.directory_of(number)
        overrides = [
            *self.overrides, f"data.train=[{quoted(directory / 'feedback.jsonl')}]", "data.eval=[]",
            f"output_root={quoted(config.output_root)}",  # which values of a recipe may start with
            f"run_dir={quoted(directory / 'train')}", f"exp_name={quoted(f'{config.exp_name}-{number:03d}')}",
            f"seed={config.seed + number}", "resume=auto", f"cache_dir={quoted(config.cache_dir)}",
        ]  # fmt: skip
        if not self._length_is_set:
            overrides.append("train.steps=null")  # the number in a bundled model's YAML is for full data sets
        if self.loss.on_rollouts:
            level, floor = online.correction_level or "null", online.correction_floor
            overrides += [f"train.temperature={online.sampler.temperature}", f"train.correction={online.correction}",
                          f"train.correction_level={level}", f"train.correction_cap={online.correction_cap}",
                          f"train.correction_floor={'null' if floor is None else floor}"]  # fmt: skip
        overrides += [] if self.date is None else [f"data.date={self.date}"]
        overrides += [f"data.system={config.data.system}", f"data.chat_template_kwargs={typed(config.data.chat_template_kwargs)}"]
        overrides += ["checkpoint.at_end=true"] if online.carry_optimizer else []
        overrides += ["schedule.warmup=0"] if number and self.one_warmup else []
        lora = inner.peft.name == "lora"
        return overrides + (self._continue_from(self.directory_of(number - 1) / "train", lora=lora) if number else [])

    def _continue_from(self, before: Path, *, lora: bool) -> list[str]:
        """Overrides that continue from the last round's policy; the reference is the one that was named, such as a teacher, or
        else stays the first policy by default."""
        overrides, last, named = [], self.online.reference == "last", self.inner.reference.name_or_path is not None
        if lora:
            overrides += [f"peft.init_from={quoted(before / 'FINAL' / 'adapter')}"]
            # no second copy: the reference is the policy at the start of the round, or its base, the first policy
            overrides += [] if named else [f"reference.adapter={'start' if last else 'off'}"]
            other = None
        else:
            overrides += [f"model.name_or_path={quoted(before / 'FINAL')}"]
            other = None if last or named else self.start
        if self.loss.needs_reference and other is not None:
            overrides += [f"reference.name_or_path={quoted(other)}"]
            if str(other) == self.start and self.config.model.revision is not None:
                overrides += [f"reference.revision={quoted(self.config.model.revision)}"]
        if self.online.carry_optimizer:
            overrides += [f"optim.init_from={quoted(_last_checkpoint(before))}"]
        if (coefficient := self._kl_coefficient(before)) is not None:
            overrides += [f"loss.kl_coefficient={coefficient}"]
        if (
            self.loss.settings.get("entropy_target") is not None
            and (bonus := EntropyCoefficient.value_in(before / "FINAL")) is not None
        ):
            overrides += [f"loss.entropy_coefficient={bonus}"]
        return overrides

    def _kl_coefficient(self, before: Path) -> float | None:
        """The KL coefficient at the end of the last round, where the loss adapts it to a target."""
        if self.loss.adapt is None or self.loss.settings.get("kl_target") is None:
            return None
        if (saved := KLCoefficient.value_in(before / "FINAL")) is not None:
            return saved
        rows = [row for row in RunDir(before).read_metrics() if row.get("kl_coefficient") is not None]  # runs of an older version
        return float(rows[-1]["kl_coefficient"]) if rows else None


def _last_checkpoint(run: Path) -> Path:
    """The checkpoint at the end of a round's training, from which the next one takes the optimizer state. Raises UserError where
    there is none: a round that was trained without online.carry_optimizer saves no such."""
    saved, ended = checkpoints(run / "checkpoints"), (RunDir(run).read_result() or {}).get("step")
    if saved and ended in (None, step_of(saved[-1])):
        return saved[-1]
    held = f"none of its end (step {ended}), but one of step {step_of(saved[-1])}" if saved else "no checkpoint"
    raise UserError(
        f"online.carry_optimizer: {run / 'checkpoints'} holds {held} with an optimizer state to carry over. Bring it back, or"
        " continue without: online.carry_optimizer=false resume_changes=allow"
    )
