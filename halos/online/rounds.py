"""Online rounds: sample from the policy, label, train; the next round samples from the model that was saved.

The driver trains nothing itself. Each stage is a command that writes one file or directory completely; a killed run resumes at
the first one that is missing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from halos import confined
from halos.checkpoint import integrity
from halos.checkpoint.commit import remove_leftovers, staged
from halos.config import idle_online, run_config
from halos.config.bind import bind_hook, bind_loss
from halos.config.content_hashes import ContentHashes, changes_record, log_changes
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.config.secrets import refuse_saved_overrides
from halos.confined import write_whole
from halos.data.dates import content_entry, date_of, refuse_unwritten
from halos.distributed.signals import STOPPED
from halos.errors import UserError
from halos.hooks.base import AnyRun, Hook, call_on_eval, states_of
from halos.logs import add_log_file
from halos.online import dry_run, overview
from halos.online.origins import sampled_from
from halos.online.plan import OnlinePlan
from halos.online.round import STATE, Round, RoundResult, refuse_too_few_rounds
from halos.online.stages import WRONG_INPUT, RefusedError, StageError, StoppedError, refuse_launcher
from halos.repository import COMMAND
from halos.rollout import evaluation, measure
from halos.rollout.prompts import content_hashes
from halos.rollout.types import EVAL, TRAIN
from halos.rundir import RunDir
from halos.versions import versions

log = logging.getLogger(__name__)

FINISHED, FAILED = 0, 1
OVERRIDES = "online.json"  # the overrides of each round's training
ONE_WARMUP = "one_warmup"  # in that file
HOOKS = "hooks.json"  # the hooks' state at the last start
SHOWN = ("reward", "kl", "length", "unique", "cost")


class TrainingOutline(Protocol):
    """The training of the rounds, as far as it is known before the first round."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def write(self, prompt: list[int]) -> None:
        """Log what is trained, and a prompt as the sampler gets it."""
        ...

    def content(self, outer: Config, prompts: Mapping[str, str | None]) -> ContentHashes:
        """Hashes of the data and models that the rounds use; `outer` is the configuration of the online run."""
        ...

    def code(self, outer: Config) -> Mapping[str, str | None]:
        """Hashes of the user's own code that the rounds compute with."""
        ...

    def changed(self, outer: Config, directory: RunDir, now: ContentHashes) -> Sequence[Change]:
        """Changes of these since the last start. Raises UserError for a change that was not allowed."""
        ...


def run(
    config: Config, inner: Config, overrides: Sequence[str], typed: Sequence[str], changed: Sequence[Change],
    outline: Callable[..., TrainingOutline], *, one_warmup: bool, day: date,
) -> int:  # fmt: skip
    """Run all rounds, or those that are left; return the exit status.

    `inner` is the configuration of a round's training, `overrides` its command-line overrides, and `typed` those of this command;
    `outline` checks that training before anything starts; `one_warmup` has the learning rate warm up in the first round alone;
    `day` is the date that chat templates write.
    Raises UserError.
    """
    refuse_launcher()
    plan = OnlinePlan(config, inner, list(overrides), bind_loss(inner.loss, config.plugins), one_warmup, day=day)
    idle_online.refuse_idle_reference(config, typed, is_read=plan.loss.needs_reference)
    plan.prepare()
    outlined = outline(trackers=trackers_of(config), day=day)
    plan.date = date_of(outlined.tokenizer)
    refuse_unwritten(config.data.date, plan.date, plan.scorer_date)
    prompt = plan.first_fitting_prompt(outlined.tokenizer, outlined.max_length)
    directory = plan.directory
    if config.resume and _is_over(plan):
        log.info("%s is finished already; more rounds: online.rounds=%d", directory.path, plan.online.rounds + 1)
        return FINISHED
    with directory.lock() as lock:
        lock.refuse_held(wait=bool(config.resume))
        if config.resume:
            directory.require_run()
            refuse_too_few_rounds(plan)
        else:
            directory.refuse_occupied(overwrite=config.overwrite)
        hashes = content_hashes(plan.prompts, plan.eval_prompts, plan.online.scorer.name)
        content = outlined.content(config, hashes | content_entry(plan.date, plan.scorer_date))
        altered = outlined.changed(config, directory, content) if config.resume else []
        if config.dry_run:
            dry_run.run(plan, outlined.tokenizer, partial(outlined.write, prompt), typed)
            return FINISHED
        plan.keep_code(partial(outlined.code, config))
        directory.path.mkdir(parents=True, exist_ok=True)
        if line := lock.acquire(directory.next_attempt(), wait=bool(config.resume)):
            log.warning(line)
        log_changes([*changed, *altered], "the next stage")
        return OnlineRun(plan).run(
            {"overrides": list(typed), **changes_record(changed=changed, content_changed=altered), **content.record()}
        )


def trackers_of(config: Config) -> dict[str, Hook[AnyRun]]:
    """The hooks of the online run; the training of each round has hooks of its own."""
    return {name: bind_hook(f"hooks.{name}", given, config.plugins)() for name, given in config.hooks.items()}


def _is_over(plan: OnlinePlan) -> bool:
    """Whether all requested rounds are done."""
    result = plan.directory.read_result() or {}
    done = plan.directory.is_finished() and plan.directory.final.is_dir() and result.get("step") == plan.online.rounds
    if done:
        integrity.check_final(plan.directory, plan.cache)
    return done


class OnlineRun:
    """Runs the rounds. To hooks it is an AnyRun, whose `step` is the number of the round."""

    def __init__(self, plan: OnlinePlan) -> None:
        self.plan, self.config, self.directory = plan, plan.config, plan.directory
        self.main, self.step, self.settings = True, 0, plan.settings
        self.hooks: dict[str, Hook[AnyRun]] = {}
        self.metrics: dict[str, Any] = {}

    def run(self, attempt: Mapping[str, Any]) -> int:
        """Run the rounds; return the exit status. `attempt` goes into the record of this attempt."""
        self._begin(attempt)
        self.plan.stages.listen()
        status, note = "failed", None
        try:
            for hook in self.hooks.values():
                hook.on_start(self)
            write_whole(self.directory.path / HOOKS, json.dumps(self._hook_states()) + "\n")
            for number in range(self.plan.online.rounds):
                self.step = number
                current = Round(self.plan, number, self.plan.directory_of(number))
                if current.is_done:
                    self.metrics = current.state.get("metrics", {})
                    continue
                self._record(current, current.run())
                current.close(self.metrics, self._hook_states())
                self._delete_old_weights(number)
            self.step = self.plan.online.rounds
            self._finish()
            status = "finished"
        except StoppedError as stopped:
            status, note = "stopped", str(stopped)
        except RefusedError as error:
            status, note = "refused", str(error)
        except StageError as error:
            note = str(error)
            log.error("failed: %s", error)
        except BaseException as error:
            note = f"{type(error).__name__}: {error}"
            raise
        finally:
            try:
                for hook in self.hooks.values():
                    hook.on_end(self)
            finally:
                self.directory.write_result("failed" if status == "refused" else status, self.step, self.metrics, reason=note)
        if status == "finished":
            log.info("finished: %s", self.directory.final)
        elif status == "stopped":
            command = run_config.resume_arguments(self.config, self.directory.path)
            log.info("stopped: %s; resume with: %s %s", note, COMMAND, command)
        return {"finished": FINISHED, "stopped": STOPPED, "refused": WRONG_INPUT}.get(status, FAILED)

    def _begin(self, attempt: Mapping[str, Any]) -> None:
        directory, resumed = self.directory, bool(self.config.resume)
        if not resumed:
            directory.create(overwrite=self.config.overwrite)
            directory.write_config(run_config.dump(self.config))
        stored = {"words": self.plan.overrides, ONE_WARMUP: self.plan.one_warmup}
        write_whole(directory.path / OVERRIDES, json.dumps(stored, indent=1) + "\n")
        add_log_file(directory.log_of(0))
        remove_leftovers(directory.path)
        day = self.plan.date or self.plan.scorer_date
        dated = {} if day is None else {run_config.DATE: day}
        directory.start_attempt({**attempt, "total_steps": self.plan.online.rounds, **dated, **versions()})
        self.hooks = trackers_of(self.config)
        for name, state in self._saved_hook_states().items():
            if name in self.hooks and isinstance(state, dict):
                self.hooks[name].load_state_dict(state)
        directory.write_result("running", 0, {})
        overview.write(self.plan)
        log.info("run        %s", directory.path)

    def _hook_states(self) -> dict[str, Any]:
        """The state of every hook, for a resume."""
        return states_of(self.hooks)

    def _saved_hook_states(self) -> dict[str, Any]:
        """The hooks' state after the last completed round, else that of the last start."""
        rounds = [self.plan.directory_of(number) / STATE for number in reversed(range(self.plan.online.rounds))]
        for path in filter(Path.is_file, [*rounds, self.directory.path / HOOKS]):
            saved = confined.load_object(path, within=self.directory.path)
            states = saved if path.name == HOOKS else saved.get("hooks") if saved.get("done") else None
            if isinstance(states, dict):
                return states
        return {}

    def _record(self, current: Round, result: RoundResult) -> None:
        """Log a round's metrics and examples, replacing any metrics that an earlier attempt left."""
        self.directory.truncate_metrics(current.number - 1)
        for split, metrics in ((TRAIN, result.train), (EVAL, result.evaluation)):
            if metrics:
                row = {"step": current.number, "split": split, **metrics}
                self.directory.append_metrics(call_on_eval(self.hooks, self, row))
        if result.examples:
            title, held_out = f"{self.config.exp_name}, round {current.number}", evaluation.summary(result.evaluation)
            measure.write_examples(current.directory, result.examples, title, held_out)
            rows = [rollout.shown() for rollout in result.examples]
            for hook in self.hooks.values():
                hook.on_examples(self, rows)
        merged = {**result.train, **result.evaluation}
        self.metrics = {name: value for name, value in merged.items() if not name.startswith("seconds")}
        shown = [f"{name} {value:.4g}" for name, value in result.train.items() if name in SHOWN]
        shown += [f"held-out {text}" for text in evaluation.summary(result.evaluation)]
        shown.append(f"seconds {current.spent}{' without stages that were cut off' if current.is_resumed else ''}")
        log.info("round %d of %d: %s", current.number, self.plan.online.rounds, ", ".join(shown))

    def _delete_old_weights(self, number: int) -> None:
        """Delete the weights of rounds before the last `online.keep_rounds`, and a carried optimizer state of all but the last,
        from which none starts; their samples and metrics stay."""
        online = self.plan.online
        if online.keep_rounds is None:
            return
        for old in range(number):
            weights = ("FINAL", "checkpoints", "rollouts") if old <= number - online.keep_rounds else ()
            for name in weights or (("checkpoints",) if online.carry_optimizer else ()):
                shutil.rmtree(self.plan.directory_of(old) / "train" / name, ignore_errors=True)

    def _finish(self) -> None:
        """Evaluate the last policy, and write FINAL."""
        plan = self.plan
        last = plan.policy(plan.online.rounds)
        if plan.eval_prompts:
            directory = self.directory.path / "exam"
            if not sampled_from(directory / "samples.jsonl", last, None, plan.cache):
                shutil.rmtree(directory, ignore_errors=True)  # of an earlier attempt with fewer rounds
            last_round = Round(plan, plan.online.rounds, directory)
            self._record(last_round, last_round.evaluate())
        integrity.check(Path(last), "the last policy", plan.cache)  # before copying, since the copy gets a manifest of its own
        with staged(self.directory.final, main=True, facts={"rounds": plan.online.rounds}) as hidden:
            shutil.copytree(last, hidden, dirs_exist_ok=True, copy_function=_link, ignore=shutil.ignore_patterns("manifest.json"))


def _link(source: str, target: str) -> str:
    """Hard-link a file, or copy it where the file system cannot; the files of a FINAL are never modified."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def warms_up_once(run: Path) -> bool:
    """Whether the learning rate of a saved run warms up in its first round alone. Raises UserError where that cannot be read."""
    return confined.load_object(run / OVERRIDES, within=run).get(ONE_WARMUP) is True


def stored_overrides(run: Path) -> list[str]:
    """The overrides of a saved run's training. Raises UserError where they cannot be read."""
    path = run / OVERRIDES
    overrides = confined.load_object(path, within=run).get("words")
    if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
        raise UserError(f"{path} does not hold a list of overrides")
    # these two must be passed again on the command line
    overrides = [word for word in overrides if not word.startswith(("plugins=", "cache_dir="))]
    refuse_saved_overrides(overrides, str(path))
    return overrides
