"""One attempt at a run, from its start to its exit status: the lock, signals, the loop, the word it leaves behind."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from halos.checkpoint import integrity
from halos.config import run_config
from halos.config.bind_optim import bind_schedule
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.config.values import as_argument
from halos.confined import DISK_FULL
from halos.distributed.launch import launched, make_accelerator, require_same_on_all_ranks
from halos.distributed.signals import STOPPED, StopRequest
from halos.distributed.watchdog import request_stop_when_launcher_dies, watch_ranks
from halos.errors import UserError
from halos.hooks.base import Run
from halos.hooks.log import summary
from halos.logs import configure_logging, log_traceback
from halos.repository import COMMAND
from halos.run.assemble import assemble
from halos.rundir import RunDir, is_run
from halos.trainers.base import Trainer
from halos.trainers.memory import ran_out, remedies

log = logging.getLogger(__name__)

FINISHED, FAILED = 0, 1


class StopRequested(BaseException):
    """A stop request arrived before the first step, when there is nothing to save yet."""


def _raise_stop_requested(reason: str) -> None:
    raise StopRequested(reason)


def run(config: Config, typed: list[str], changed: Sequence[Change] = ()) -> int:
    """Train, or go on with a run; the exit status. Raises UserError for whatever is the user's to mend."""
    directory, request = RunDir(config.run_dir), StopRequest()
    with directory.lock() as lock:
        try:
            request.listen(_raise_stop_requested, second_interrupt_kills=False)
            request.listen_for_launcher_death()
            _freeze_imports()
            made = make_accelerator(config.train.precision, config.model.dtype, deterministic=config.train.deterministic)
            request_stop_when_launcher_dies(launched())
            configure_logging(made.is_main_process)
            with watch_ranks(made):
                require_same_on_all_ranks(made, "configuration", run_config.dump(replace(config, cache_dir="")))
                if config.resume and _is_over(config, directory, changed):
                    return FINISHED
                trainer = assemble(config, typed, made, changed, lock)
                return _train(trainer, request) if trainer else FINISHED
        except BaseException as error:
            if request.reason is not None:  # not `except StopRequested`: libraries turn it into errors of their own
                return _stopped_before_training(directory, request.reason, held=lock.held)
            if isinstance(error, UserError) and lock.held and not config.resume:
                directory.remove_refused_start()
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise UserError(f"no space is left for {error.filename or directory.path}: free some, and go on") from error
            if ran_out(error):
                return _out_of_memory(config, directory, error, held=lock.held)
            raise


def _out_of_memory(config: Config, directory: RunDir, error: BaseException, *, held: bool) -> int:
    """In one message, with what would help; the traceback is in the log."""
    said = " ".join(str(error).split()).partition(" If reserved")[0]
    log_traceback(f"out of memory: {said}", error)
    if held and is_run(directory.path):
        before = directory.read_result() or {"step": 0, "metrics": {}}
        directory.write_result("failed", before["step"], before["metrics"], reason=f"out of memory: {said}")
        last = next(reversed(directory.checkpoints_by_step().values()), None)
        more = f" The run goes on from {last.name}: {COMMAND} resume={directory.path} KEY=VALUE." if last else ""
    else:
        more = ""
    log.error("out of memory (%s). What helps: %s.%s", said[:300], remedies(config), more)
    return FAILED


@cache
def _freeze_imports() -> None:
    """Take what was imported out of the garbage collector's sight: 440,000 objects, which each full collection would walk for
    0.27 s, and transformers' sampling loop asks for two at every call."""
    gc.freeze()


def _stopped_before_training(directory: RunDir, reason: str, *, held: bool) -> int:
    log.warning("stopped: %s, before the first step", reason)
    if held and is_run(directory.path):
        before = directory.read_result() or {"step": 0, "metrics": {}}
        directory.write_result("stopped", before["step"], before["metrics"], reason=reason)
    return STOPPED


def _is_over(config: Config, directory: RunDir, changed: Sequence[Change]) -> bool:
    """Whether a finished run is asked for nothing that it has not done yet; says what would be more."""
    further = {"train.steps", "train.epochs", "train.early_stopping"} & {change.key for change in changed}
    if not directory.is_finished() or not directory.final.is_dir() or further or directory.requested_checkpoint(config.resume):
        return False
    integrity.check_final(directory, Path(config.cache_dir).expanduser())
    log.info("%s is finished already; its model is %s", directory.path, directory.final)
    schedule = bind_schedule(config.schedule, config.plugins)
    if not schedule.depends_on_total(int((directory.read_result() or {}).get("step") or 0)):
        log.info("to train on: %s %s train.steps=MORE", COMMAND, run_config.resume_arguments(config, directory.path))
    else:
        onward = as_argument("model.name_or_path", directory.final)
        log.info("its %s schedule is at its end: a new run goes on with %s", schedule.name, onward)
    return True


def _train(trainer: Trainer, request: StopRequest) -> int:
    """Run the loop, and write result.json however it ends."""
    current, training_request = trainer.run, StopRequest()
    training_request.listen(partial(setattr, current, "stop_requested"))
    training_request.listen_for_launcher_death()
    # StopRequested is lost where the code it interrupts cannot raise. From here on errors are the loop's, so `run` must not
    # take them for a stop before the first step
    current.stop_requested, training_request.reason, request.reason = request.reason, request.reason, None
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
        try:
            trainer.checkpointer.end()
            current.call_hooks(lambda hook: hook.on_end(current))
        finally:  # whatever a hook makes of the end, the run's last word stands
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
        log.info("go on with: %s %s", COMMAND, run_config.resume_arguments(current.config, current.directory.path))
    if status == "stopped" and current.stop is not None and current.stop.signalled:
        return STOPPED
    return FINISHED if status == "finished" else FAILED
