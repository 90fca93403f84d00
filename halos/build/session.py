"""One attempt at a run, from its config to its exit status."""

import logging
import shlex
import signal
import types
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed

from halos.build import facts, model, strategy
from halos.build.feed import feed
from halos.build.processes import accelerator, agree, launched
from halos.build.watch import ORPHANED, outlive_no_launcher, together
from halos.checkpoint import find
from halos.checkpoint.state import load_optimizer
from halos.config import saved
from halos.config.bind import LossSpec, bind_hook, bind_loss
from halos.config.changes import Change
from halos.config.schema import Config
from halos.data.template import chat_template
from halos.errors import UserError
from halos.hooks.base import Hook, Run
from halos.hooks.checkpoint import CheckpointHook, restore
from halos.hooks.early_stopping import EarlyStopping
from halos.hooks.kl import KLCoefficient
from halos.hooks.log import MetricsLog, summary
from halos.hooks.progress import ProgressBar
from halos.lock import RunLock
from halos.logs import speak, write_to
from halos.models.load import load_tokenizer, refuse_other_model
from halos.models.locate import locate
from halos.rundir import RunDir, is_run
from halos.signals import AGAIN, ASKING
from halos.trainers.base import Trainer
from halos.trainers.paired import PairedTrainer
from halos.trainers.policy_gradient import PolicyGradientTrainer
from halos.trainers.reward import RewardTrainer
from halos.trainers.sft import SFTTrainer
from halos.trainers.unpaired import UnpairedTrainer
from halos.types import Labelled, Pair, PairScores, Rollouts, TokenLogps, ValuedRollouts
from halos.zero.config import refuse_settings

log = logging.getLogger(__name__)

TRAINERS: dict[type, type[Trainer]] = {
    TokenLogps: SFTTrainer,
    Pair: PairedTrainer,
    Labelled: UnpairedTrainer,
    PairScores: RewardTrainer,
    Rollouts: PolicyGradientTrainer,
    ValuedRollouts: PolicyGradientTrainer,
}
FINISHED, FAILED = 0, 1
SHARED = "all hosts write into it, so output_root (or run_dir) must lie on a file system that they share"


class Interrupted(BaseException):
    """A signal came while there was nothing to save yet."""


def run(config: Config, typed: list[str], changed: Sequence[Change] = ()) -> int:
    """Train, or go on with a run; the exit status. Raises UserError for whatever is the user's to mend."""
    directory, told = RunDir(config.run_dir), list[str]()
    with directory.lock() as lock:
        try:
            _listen(None, told)
            made = accelerator(config.train.precision, config.model.dtype)
            outlive_no_launcher(launched())
            speak(made.is_main_process)
            with together(made):
                agree(made, "configuration", saved.dump(replace(config, cache_dir="")))
                if config.resume and _is_over(config, directory, changed):
                    return FINISHED
                trainer = assemble(config, typed, made, changed, lock)
                return _train(trainer, told) if trainer else FINISHED
        except BaseException as error:
            if told:  # whatever became of Interrupted on its way: libraries turn it into errors of their own
                return _stopped_at_the_start(directory, told[0], held=lock.held)
            if isinstance(error, UserError) and lock.held and not config.resume:
                directory.abandon()
            raise


def _stopped_at_the_start(directory: RunDir, told: str, *, held: bool) -> int:
    log.warning("stopped: %s, before the first step", told)
    if held and is_run(directory.path):
        before = directory.read_result() or {"step": 0, "metrics": {}}
        directory.write_result("stopped", before["step"], before["metrics"], reason=told)
    return AGAIN


def _is_over(config: Config, directory: RunDir, changed: Sequence[Change]) -> bool:
    """Whether a finished run is asked for nothing that it has not done yet; says what would be more."""
    further = {"train.steps", "train.epochs", "train.early_stopping"} & {change.key for change in changed}
    if not directory.is_finished() or not directory.final.is_dir() or further or directory.asked_checkpoint(config.resume):
        return False
    log.info("%s is finished already; its model is %s", directory.path, directory.final)
    if config.schedule.name == "constant":
        log.info("to train on: python train.py resume=%s train.steps=MORE", directory.path)
    else:
        log.info(
            "its %s schedule is at its end: a new run goes on with model.name_or_path=%s", config.schedule.name, directory.final
        )
    return True


def assemble(
    config: Config, typed: list[str], made: Accelerator, changed: Sequence[Change] = (), lock: RunLock | None = None
) -> Trainer | None:
    """Everything a run needs, ready for `fit`; None for a dry run. What can be wrong is found before the model loads."""
    loss = bind_loss(config.loss, config.plugins)
    trained = config.model.dtype if config.peft.name == "none" else "float32"  # an adapter always is
    refuse_settings(max_grad_norm=config.train.max_grad_norm, trained=trained)
    set_seed(config.seed % 2**32)  # for what hooks and plugins draw; weights and steps have seeds of their own
    checkpoint, hooks = _hooks(config, loss)
    directory = RunDir(config.run_dir)
    if made.is_main_process:
        if lock:
            lock.refuse_held(wait=bool(config.resume))
        directory.open() if config.resume else directory.refuse_occupied(overwrite=config.overwrite)
    base = _base(config, made)
    tokenizer, new_tokens = load_tokenizer(base, add_tokens=config.model.add_tokens)
    tokenizer.chat_template = chat_template(tokenizer, config.model.chat_template)
    source_of_rows = feed(config, loss, tokenizer, made)
    total = source_of_rows.total
    if config.dry_run:
        for name, line in source_of_rows.lines():
            log.info("%-10s %s", name, line)
        log.info("%d steps of %d; everything fits together, nothing was trained", total, config.train.batch_size)
        return None
    named = model.named_reference(config, tokenizer, new_tokens) if loss.needs_reference else None
    source = _begin(config, directory, made, total, lock)
    shelf = model.Shelf(config, base, tokenizer, new_tokens, made)
    current = _load(shelf, loss, hooks, directory, total, source.path)
    against = model.reference(shelf, current.model, named) if loss.needs_reference else None
    against = strategy.distribute_frozen(against, made) if against else None
    if source.path is not None:
        restore(current, source.path)  # last: loading models draws random numbers
    elif config.optim.init_from is not None:
        load_optimizer(Path(config.optim.init_from) / "state", current.module, current.optimizer)
    if made.is_main_process:
        _record(current, typed, source, changed)
    rows = source_of_rows.open(current, partial(model.skeleton, shelf))
    facts.header(current, loss, source_of_rows.lines(), rows.train, rows.held_out, against)
    return TRAINERS[loss.inputs](
        current, loss, checkpoint, train=rows.train, held_out=rows.held_out, order=rows.order, reference=against, exam=rows.exam
    )


def _hooks(config: Config, loss: LossSpec) -> tuple[CheckpointHook, dict[str, Hook]]:
    """The checkpoint hook; and all hooks in order: it first, the run's own record, then the config's, in its order."""
    checkpoint = bind_hook("checkpoint", config.checkpoint, config.plugins)()
    if not isinstance(checkpoint, CheckpointHook):
        raise UserError(f"checkpoint._target_={config.checkpoint['_target_']} is no CheckpointHook")
    hooks: dict[str, Hook] = {"checkpoint": checkpoint, "metrics": MetricsLog(), "progress": ProgressBar()}
    if config.train.early_stopping is not None:
        hooks["early_stopping"] = EarlyStopping(patience=config.train.early_stopping)
    if loss.adapt is not None:
        hooks["kl_coefficient"] = KLCoefficient(loss.settings["kl_coefficient"])
    return checkpoint, hooks | {name: bind_hook(f"hooks.{name}", given, config.plugins)() for name, given in config.hooks.items()}


def _begin(config: Config, directory: RunDir, made: Accelerator, total: int, lock: RunLock | None) -> find.Found:
    """Make the run's directory, or find what it goes on from: one process decides, so that all agree."""
    box: list[Any] = [find.Found(None, [])]
    taken_over = None
    if made.is_main_process and lock:
        directory.path.mkdir(parents=True, exist_ok=True)
        taken_over = lock.acquire(directory.next_attempt(), wait=bool(config.resume))
    if made.is_main_process and config.resume:
        box = [find.go_on(directory, directory.asked_checkpoint(config.resume))]
        _refuse_behind(config, directory, box[0].path, total)
    elif made.is_main_process:
        directory.create(overwrite=config.overwrite)
        directory.write_config(saved.dump(config))
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    seen = is_run(directory.path)
    agree(made, "run directory", str(seen), None if seen else f"{directory.path} is not there on this host: {SHARED}")
    write_to(directory.log_of(made.process_index))
    if taken_over:
        log.warning(taken_over)
    return box[0]


def _refuse_behind(config: Config, directory: RunDir, source: Path | None, total: int) -> None:
    """Raises UserError where a run is to end before where it is, or where nothing is left to go on from."""
    result = directory.read_result() or {}
    done = result.get("status") == "finished" and directory.final.is_dir() and not directory.asked_checkpoint(config.resume)
    if done and source is None:
        raise UserError(
            f"{directory.path} is finished and has kept no checkpoint to train on from (checkpoint.every=null?): begin a new run"
            f" with model.name_or_path={directory.final}"
        )
    step = max(find.step_of(source) if source else 0, int(result.get("step") or 0) if done else 0)
    if step > total:
        raise UserError(
            f"{directory.path} is at step {step}, and is to end at {total}: give more train.steps, or name an earlier checkpoint,"
            f" resume={directory.checkpoints}/step-N"
        )


def _base(config: Config, made: Accelerator) -> Path:
    assert config.model.name_or_path is not None, "the gate lets no run through without a model"
    with made.main_process_first():
        return locate(config.model.name_or_path, config.model.revision, Path(config.cache_dir).expanduser())


def _load(
    shelf: model.Shelf, loss: LossSpec, hooks: dict[str, Hook], directory: RunDir, total: int, checkpoint: Path | None
) -> Run:
    """Model and optimizer as the strategy wants them; the weights are those of the checkpoint that the run goes on from."""
    reward = loss.inputs is PairScores
    if checkpoint is not None and shelf.config.peft.name == "none":
        refuse_other_model(shelf.base, checkpoint / "model")
    inner = model.policy(shelf, reward=reward, checkpoint=checkpoint)
    module, optimizer = strategy.distribute(
        model.wrapped(shelf, inner, loss.inputs, checkpoint),
        shelf.made,
        partial(model.optimizer, settings=shelf.config.optim),
        max_grad_norm=shelf.config.train.max_grad_norm,
    )
    current = Run(
        config=shelf.config, directory=directory, accelerator=shelf.made, module=module, model=inner, base=shelf.base,
        optimizer=optimizer, tokenizer=shelf.tokenizer, reward=reward, total_steps=total, hooks=hooks,
    )  # fmt: skip
    return current


def _record(current: Run, typed: list[str], source: find.Found, changed: Sequence[Change]) -> None:
    directory, resume = current.directory, current.config.resume
    for line in source.passed_over:
        log.warning(line)
    went_on = f"checkpoints/{source.path.name}" if source.path else "nothing: step 0"
    if resume:
        log.info("going on from %s", went_on)
        _tell_changes(changed, current.step)
        place, moved = directory.set_aside(current.step, final=directory.asked_checkpoint(resume) is not None)
        if moved:
            log.warning("set aside in %s, since the run goes on from before: %s", place, ", ".join(moved))
    how = strategy.name_of(current.module)
    record = facts.attempt(typed, current.accelerator, strategy=how, source=went_on, total_steps=current.total_steps)
    altered = {"changed": {change.key: [change.old, change.new] for change in changed}} if changed else {}
    directory.start_attempt({**record, **altered, "passed_over": source.passed_over})
    directory.truncate_metrics(current.step if source.path else -1)
    directory.write_result("running", current.step, {})


def _tell_changes(changed: Sequence[Change], step: int) -> None:
    if safe := [str(change) for change in changed if change.why is None]:
        log.info("changed: %s", ", ".join(safe))
    if others := [str(change) for change in changed if change.why is not None]:
        log.warning("CHANGED WHAT THE RUN COMPUTES, from step %d on: %s", step, ", ".join(others))


def _train(trainer: Trainer, told: list[str]) -> int:
    """The loop, and the word it leaves in result.json however it ends."""
    current = trainer.run
    _listen(current, told)
    if told:  # Interrupted got lost: what it was raised in cannot raise
        current.interrupted = told.pop(0)
    status, note = "failed", None
    try:
        trainer.fit()
        stopped = current.stop is not None and not current.stop.finished
        status = "failed" if current.failure else "stopped" if stopped else "finished"
        note = current.failure or (current.stop.reason if current.stop else None)
    except BaseException as error:
        note = f"{type(error).__name__}: {error}"
        _name_log(current, error)
        raise
    finally:
        for hook in current.hooks.values():
            hook.on_end(current)
        if current.main:
            metrics = {name: value for name, value in current.last_eval.items() if name not in ("split", "seconds")}
            current.directory.write_result(status, current.step, metrics, reason=note)
    return _close(current, status, note)


def _name_log(current: Run, error: BaseException) -> None:
    """Of several processes each has a file of its own, which has the traceback."""
    rank = current.accelerator.process_index
    if current.accelerator.num_processes > 1:
        log.info("%s", error, exc_info=error)
        log.error("process %d failed; its log is %s", rank, current.directory.log_of(rank))


def _close(current: Run, status: str, note: str | None) -> int:
    if note:
        log.info("stopped: %s", note) if status != "failed" else log.error("failed: %s", note)
    if status == "finished" and current.main:
        log.info("finished: %s  %s", current.directory.final, summary(current.last_eval or current.last_train))
    if status == "stopped" and current.main:
        plugins = [f"plugins=[{','.join(current.config.plugins)}]"] if current.config.plugins else []
        log.info("go on with: python train.py %s", shlex.join([f"resume={current.directory.path}", *plugins]))
    if status == "stopped" and current.stop is not None and current.stop.signalled:
        return AGAIN
    return FINISHED if status == "finished" else FAILED


def _listen(current: Run | None, told: list[str]) -> None:
    """A first signal asks for a complete save and a clean end; a second Ctrl-C ends the process at once. Of the others more
    may come, since schedulers and launchers repeat themselves. Without a run there is nothing to save: what came is `told`."""

    def end_the_start(reason: str) -> None:
        if not told:
            told.append(reason)
            raise Interrupted(reason)

    def ask(number: int, _: types.FrameType | None) -> None:
        if current is None:
            end_the_start(signal.Signals(number).name)
            return
        if current.interrupted and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        current.interrupted = current.interrupted or signal.Signals(number).name

    def orphaned(number: int, _: types.FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # the rest of them
        if current is None:
            end_the_start("its launcher has died")
            return
        current.interrupted = current.interrupted or "its launcher has died"

    for number in ASKING:
        signal.signal(number, ask)
    signal.signal(ORPHANED, orphaned)
