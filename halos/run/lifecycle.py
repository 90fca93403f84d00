"""One attempt at a run, from its start to its exit status: lock, stop requests, training loop, result.json."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from halos.checkpoint import integrity
from halos.collection import freeze_imports
from halos.config import resume_policy, run_config
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.config.values import as_argument
from halos.confined import DISK_FULL
from halos.distributed.agreement import require_same_on_all_ranks
from halos.distributed.launch import launched, make_accelerator
from halos.distributed.signals import STOPPED, StopRequest
from halos.distributed.watchdog import request_stop_when_launcher_dies, watch_ranks
from halos.errors import UserError
from halos.hooks.base import Run
from halos.hooks.log import summary
from halos.logs import configure_logging, log_traceback
from halos.repository import COMMAND
from halos.run import input_hashes
from halos.run.assemble import assemble
from halos.rundir import RunDir, is_run
from halos.trainers.base import Trainer
from halos.trainers.memory import is_out_of_memory, remedies

log = logging.getLogger(__name__)

FINISHED, FAILED = 0, 1


class StopRequested(BaseException):
    """A stop request arrived before the first step, when there is nothing to save yet."""


def _raise_stop_requested(reason: str) -> None:
    raise StopRequested(reason)


def run(config: Config, overrides: list[str], changed: Sequence[Change] = ()) -> int:
    """Start or resume a run, and return its exit status. Raises UserError for what the user can correct."""
    directory, request = RunDir(config.run_dir), StopRequest()
    with directory.lock() as lock:
        try:
            request.listen(_raise_stop_requested, second_interrupt_kills=False)
            request.listen_for_launcher_death()
            freeze_imports()
            train, dtype = config.train, config.model.dtype
            accelerator = make_accelerator(train.precision, dtype, deterministic=train.deterministic)
            request_stop_when_launcher_dies(launched())
            configure_logging(accelerator.is_main_process)
            with watch_ranks(accelerator):
                require_same_on_all_ranks(accelerator, "configuration", run_config.dump(replace(config, cache_dir="")))
                if config.resume and _nothing_to_do(config, directory, changed):
                    return FINISHED
                trainer = assemble(config, overrides, accelerator, changed, lock)
                return _train(trainer, request) if trainer else FINISHED
        except BaseException as error:
            if request.reason is not None:  # not `except StopRequested`: libraries turn it into errors of their own
                return _stopped_before_training(directory, request.reason, held=lock.held)
            if isinstance(error, UserError) and lock.held and not config.resume:
                directory.remove_refused_start()
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise UserError(f"no space is left for {error.filename or directory.path}: free some, and resume") from error
            if is_out_of_memory(error):
                return _out_of_memory(config, directory, error, held=lock.held)
            raise


def _out_of_memory(config: Config, directory: RunDir, error: BaseException, *, held: bool) -> int:
    """Report it in one message, with what would help; the traceback is in the log."""
    message = " ".join(str(error).split()).partition(" If reserved")[0]
    log_traceback(f"out of memory: {message}", error)
    if held and is_run(directory.path):
        before = directory.read_result() or {"step": 0, "metrics": {}}
        directory.write_result("failed", before["step"], before["metrics"], reason=f"out of memory: {message}")
        last = next(reversed(directory.checkpoints_by_step().values()), None)
        hint = f" Resume from {last.name}: {COMMAND} resume={directory.path} KEY=VALUE." if last else ""
        attempts = directory.read_attempts()
    else:
        hint, attempts = "", {}
    budget, checkpointed = run_config.recorded_budget(attempts), run_config.recorded_checkpointing(attempts)
    log.error("out of memory (%s). What helps: %s.%s", message[:300], remedies(config, budget, checkpointed=checkpointed), hint)
    return FAILED


def _stopped_before_training(directory: RunDir, reason: str, *, held: bool) -> int:
    log.warning("stopped: %s, before the first step", reason)
    if held and is_run(directory.path):
        before = directory.read_result() or {"step": 0, "metrics": {}}
        directory.write_result("stopped", before["step"], before["metrics"], reason=reason)
    return STOPPED


def _nothing_to_do(config: Config, directory: RunDir, changed: Sequence[Change]) -> bool:
    """Return whether a resumed run is finished and nothing asks for more; log how to continue it."""
    more = {*resume_policy.LENGTH} & {change.key for change in changed}
    if not directory.is_finished() or not directory.final.is_dir() or more or directory.requested_checkpoint(config.resume):
        return False
    input_hashes.refuse_other_code(config, directory)
    integrity.check_final(directory, Path(config.cache_dir).expanduser())
    log.info("%s is finished already; its model is %s", directory.path, directory.final)
    longer = f"{COMMAND} {run_config.resume_arguments(config, directory.path)} train.steps=MORE"
    start = as_argument("model.name_or_path", directory.final)
    newest = next(reversed(directory.checkpoints_by_step()), None)
    if newest is None:
        log.info("no checkpoint of it is left: continue in a new run with %s", start)
        return True
    total = run_config.recorded_total(directory.read_attempts())
    if (why := resume_policy.why_not(config, newest, total, resume_policy.longer_than(newest))) is None:
        log.info("to continue: %s", longer)
    else:
        log.info("a longer run would have had other learning rates from its start, since %s: continue in a new run with %s, or"
                 " continue this one all the same: %s resume_changes=allow", why, start, longer)  # fmt: skip
    return True


def _train(trainer: Trainer, request: StopRequest) -> int:
    """Run the loop, and write result.json however it ends."""
    current, training_request = trainer.run, StopRequest()
    training_request.listen(partial(setattr, current, "stop_requested"))
    training_request.listen_for_launcher_death()
    # StopRequested is lost where the code it interrupts cannot raise. From here on errors are the loop's, so `run` must not
    # take them for a stop before the first step
    current.stop_requested, training_request.reason, request.reason = request.reason, request.reason, None
    status, note, began = "failed", None, time.perf_counter()
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
            _end(trainer)
        except BaseException as error:
            note = note or f"after the last step: {type(error).__name__}: {error}"
            raise
        finally:
            if current.main:
                measured = current.last_eval.items()
                metrics = {name: value for name, value in measured if name != "split" and not name.startswith("seconds")}
                seconds = time.perf_counter() - began
                current.directory.result.write(status, current.step, metrics, reason=note, seconds=seconds)
    return _close(current, status, note)


def _end(trainer: Trainer) -> None:
    """Close all that is open: what raises keeps no other hook from closing what it has."""
    with ExitStack() as stack:
        for hook in reversed(trainer.run.hooks.values()):
            stack.callback(hook.on_end, trainer.run)
        stack.callback(trainer.checkpointer.end)


def _name_log(current: Run, error: BaseException) -> None:
    """Log the traceback, and name this rank's log: of several ranks each has one of its own."""
    rank = current.accelerator.process_index
    if current.accelerator.num_processes > 1:
        log.info("%s", error, exc_info=error)
        log.error("rank %d failed; its log is %s", rank, current.directory.log_of(rank))


def _close(current: Run, status: str, note: str | None) -> int:
    if note:
        log.info("stopped: %s", note) if status != "failed" else log.error("failed: %s", note)
    if status == "finished" and current.main:
        measured, where = (current.last_eval, "held out") if current.last_eval else (current.last_train, "last step")
        text = summary(measured, objective=current.config.objective.metric)
        log.info("finished: %s  %s: %s", current.directory.final, where, text)
    if status == "stopped" and current.main:
        log.info("resume with: %s %s", COMMAND, run_config.resume_arguments(current.config, current.directory.path))
    if status == "stopped" and current.stop is not None and current.stop.signalled:
        return STOPPED
    return FINISHED if status == "finished" else FAILED
