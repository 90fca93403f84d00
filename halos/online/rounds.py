"""Rounds: sample from the policy, label, train, and the next round samples from what was saved.

The driver trains nothing itself. Each stage is a command that writes one file or directory, whole; a run that was killed goes
on at the first that is not there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from halos import confined
from halos.checkpoint import integrity
from halos.checkpoint.commit import remove_leftovers, staged
from halos.config import run_config
from halos.config.bind import bind_hook, bind_loss
from halos.config.content_hashes import ContentHashes, changes_record
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.config.secrets import refuse_saved_overrides
from halos.confined import write_whole
from halos.distributed.environment import world_size
from halos.distributed.signals import STOPPED
from halos.errors import UserError
from halos.hooks.base import AnyRun, Hook, call_on_eval
from halos.logs import add_log_file
from halos.online.plan import Plan
from halos.online.round import NOTE, Round, RoundResult, sampled_from
from halos.online.stages import WRONG_INPUT, RefusedError, StageError, StoppedError
from halos.repository import COMMAND
from halos.rollout import measure
from halos.rollout.prompts import digest
from halos.rollout.types import EVAL, TRAIN
from halos.rundir import RunDir
from halos.versions import versions

log = logging.getLogger(__name__)

FINISHED, FAILED = 0, 1
OVERRIDES = "online.json"  # what each round's training is given
HOOKS = "hooks.json"  # what they remembered at the last start
SHOWN = ("reward", "kl", "length", "unique", "cost")


class Outlined(Protocol):
    """What the rounds need to know of what they train, before the first of them."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def write(self, prompt: list[int]) -> None:
        """Say what is trained, and a prompt as a sampler is fed it."""
        ...

    def content(self, whole: Config, prompts: Mapping[str, str | None]) -> ContentHashes:
        """What the rounds stand on."""
        ...

    def changed(self, whole: Config, directory: RunDir, now: ContentHashes) -> Sequence[Change]:
        """What of it has changed since they last started. Raises UserError for what was not allowed."""
        ...


def run(
    config: Config, inner: Config, overrides: Sequence[str], typed: Sequence[str], changed: Sequence[Change],
    outline: Callable[..., Outlined],
) -> int:  # fmt: skip
    """All rounds, or those that are left; the exit status.

    `inner` is the configuration of a round's training and `overrides` what is typed for it; `outline` looks at that training
    before anything starts. Raises UserError.
    """
    if world_size() > 1:
        raise UserError(
            f"loss=online starts an accelerate launch of its own for every stage: {COMMAND} loss=online"
            " online.config_file=launch/accelerate/ddp.yaml (or cpu2, ...)"
        )
    plan = Plan(config, inner, list(overrides), bind_loss(inner.loss, config.plugins))
    plan.prepare()
    outlined = outline(samples_per_prompt=plan.online.samples_per_prompt, trackers=trackers_of(config))
    prompt = plan.first_that_fits(outlined.tokenizer, outlined.max_length)
    directory = plan.directory
    if config.resume and _is_over(plan):
        log.info("%s is finished already; more rounds: online.rounds=%d", directory.path, plan.online.rounds + 1)
        return FINISHED
    with directory.lock() as lock:
        lock.refuse_held(wait=bool(config.resume))
        if config.resume:
            directory.require_run()
        else:
            directory.refuse_occupied(overwrite=config.overwrite)
        prompts = {"data.train": digest(plan.prompts), "data.eval": digest(plan.held_out) if plan.held_out else None}
        content = outlined.content(config, prompts)
        altered = outlined.changed(config, directory, content) if config.resume else []
        if config.dry_run:
            return rehearse(plan, outlined, prompt)
        directory.path.mkdir(parents=True, exist_ok=True)
        if line := lock.acquire(directory.next_attempt(), wait=bool(config.resume)):
            log.warning(line)
        return OnlineRun(plan).go(
            {"overrides": list(typed), **changes_record(changed=changed, content_changed=altered), **content.record()}
        )


def trackers_of(config: Config) -> dict[str, Hook[AnyRun]]:
    """The workflow's own hooks; those of each round's training are its own."""
    return {name: bind_hook(f"hooks.{name}", given, config.plugins)() for name, given in config.hooks.items()}


def rehearse(plan: Plan, outlined: Outlined, prompt: list[int]) -> int:
    """Say what would be done."""
    outlined.write(prompt)
    online = plan.online
    each = min(online.prompts_per_round, len(plan.prompts))
    held = min(online.eval_prompts, len(plan.held_out))
    samples = online.samples_per_prompt
    log.info("%d rounds of %d prompts (of %d), %d samples of each", online.rounds, each, len(plan.prompts), samples)
    log.info("%d held-out prompts", held)
    log.info("%s feedback by %s for loss=%s", plan.kind, online.scorer.name, online.loss)
    log.info("training of each round: %s %s", COMMAND, " ".join(plan.overrides))
    log.info("everything fits together, nothing was started")
    return FINISHED


def _is_over(plan: Plan) -> bool:
    """Whether every round that is asked for has been walked."""
    result = plan.directory.read_result() or {}
    done = plan.directory.is_finished() and plan.directory.final.is_dir() and result.get("step") == plan.online.rounds
    if done:
        integrity.check_final(plan.directory, plan.cache)
    return done


class OnlineRun:
    """What hooks see of it: `config`, `directory`, `main`, and `step`, the number of the round."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config, self.directory = plan, plan.config, plan.directory
        self.main, self.step, self.settings = True, 0, plan.settings
        self.hooks: dict[str, Hook[AnyRun]] = {}
        self.metrics: dict[str, Any] = {}

    def go(self, attempt: Mapping[str, Any]) -> int:
        """The exit status. `attempt` is what the record of this start says of how it was asked for."""
        self._begin(attempt)
        self.plan.stages.listen()
        status, note = "failed", None
        try:
            for hook in self.hooks.values():
                hook.on_start(self)
            write_whole(self.directory.path / HOOKS, json.dumps(self._remembered()) + "\n")
            for number in range(self.plan.online.rounds):
                self.step = number
                one = Round(self.plan, number, self.plan.directory_of(number))
                if one.is_done:
                    self.metrics = one.facts.get("metrics", {})
                    continue
                self._record(one, one.go())
                one.close(self.metrics, self._remembered())
                self._clean(number)
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
                ended = "failed" if status == "refused" else status
                self.directory.write_result(ended, self.step, self.metrics, reason=note)
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
        write_whole(directory.path / OVERRIDES, json.dumps({"words": self.plan.overrides}, indent=1) + "\n")
        add_log_file(directory.log_of(0))
        remove_leftovers(directory.path)
        directory.start_attempt({**attempt, "total_steps": self.plan.online.rounds, **versions()})
        self.hooks = trackers_of(self.config)
        for name, kept in self._remembered_before().items():
            if name in self.hooks and isinstance(kept, dict):
                self.hooks[name].load_state_dict(kept)
        directory.write_result("running", 0, {})
        plan, online = self.plan, self.plan.online
        log.info("online     %s, %s feedback by %s", plan.loss.name, plan.kind, online.scorer.name)
        log.info("prompts    %d, %d a round; %d held out", len(plan.prompts), min(online.prompts_per_round, len(plan.prompts)),
                 min(online.eval_prompts, len(plan.held_out)))  # fmt: skip
        log.info("run        %s", directory.path)

    def _remembered(self) -> dict[str, Any]:
        """By the hooks, for a walk that goes on."""
        return {name: hook.state_dict() for name, hook in self.hooks.items()}

    def _remembered_before(self) -> dict[str, Any]:
        """By an earlier start: as of the last round that is done, else as of that start."""
        rounds = [self.plan.directory_of(number) / NOTE for number in reversed(range(self.plan.online.rounds))]
        for path in filter(Path.is_file, [*rounds, self.directory.path / HOOKS]):
            found = confined.load_object(path, within=self.directory.path)
            kept = found if path.name == HOOKS else found.get("hooks") if found.get("done") else None
            if isinstance(kept, dict):
                return kept
        return {}

    def _record(self, one: Round, result: RoundResult) -> None:
        """A round's rows of metrics.jsonl, in the place of any that an earlier attempt has left, and its examples."""
        self.directory.truncate_metrics(one.number - 1)
        for split, row in ((TRAIN, result.train), (EVAL, result.held)):
            if row:
                whole = {"step": one.number, "split": split, **row}
                self.directory.append_metrics(call_on_eval(self.hooks, self, whole))
        if result.examples:
            measure.write_examples(one.directory, result.examples, f"{self.config.exp_name}, round {one.number}")
            rows = [rollout.shown() for rollout in result.examples]
            for hook in self.hooks.values():
                hook.on_examples(self, rows)
        self.metrics = {name: value for name, value in {**result.train, **result.held}.items() if not name.startswith("seconds")}
        shown = [f"{name} {value:.4g}" for name, value in result.train.items() if name in SHOWN]
        shown += [f"held-out {name} {value:.4g}" for name, value in result.held.items() if name in ("reward", "win_rate")]
        log.info("round %d of %d: %s", one.number, self.plan.online.rounds, ", ".join(shown))

    def _clean(self, number: int) -> None:
        """The weights of rounds that nobody needs any more; what was sampled and measured stays."""
        if self.plan.online.keep_rounds is None:
            return
        for old in range(number + 1 - self.plan.online.keep_rounds):
            for name in ("FINAL", "checkpoints", "rollouts"):
                shutil.rmtree(self.plan.directory_of(old) / "train" / name, ignore_errors=True)

    def _finish(self) -> None:
        """The last policy's exam, and FINAL."""
        plan = self.plan
        last = plan.policy(plan.online.rounds)
        if plan.held_out:
            place = self.directory.path / "exam"
            if not sampled_from(place / "samples.jsonl", last, None, plan.cache):
                shutil.rmtree(place, ignore_errors=True)  # of a walk that was shorter
            exam = Round(plan, plan.online.rounds, place)
            self._record(exam, exam.examine())
        integrity.check(Path(last), "the last policy", plan.cache)  # what is copied is listed anew
        with staged(self.directory.final, main=True, facts={"rounds": plan.online.rounds}) as hidden:
            shutil.copytree(last, hidden, dirs_exist_ok=True, copy_function=_link, ignore=shutil.ignore_patterns("manifest.json"))


def _link(source: str, target: str) -> str:
    """The same bytes in both places, where the file system can; nothing of a FINAL is ever written into."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def stored_overrides(run: Path) -> list[str]:
    """What a saved run's training is given. Raises UserError where that cannot be read."""
    path = run / OVERRIDES
    overrides = confined.load_object(path, within=run).get("words")
    if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
        raise UserError(f"{path} holds no overrides")
    overrides = [word for word in overrides if not word.startswith(("plugins=", "cache_dir="))]  # they are typed again
    refuse_saved_overrides(overrides, str(path))
    return overrides
