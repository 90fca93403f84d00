"""Where a run begins or goes on: its directory, the checkpoint it resumes from, the record of this start."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator

from halos import confined
from halos.checkpoint import known_good, select
from halos.checkpoint.commit import HIDDEN
from halos.config import paths, run_config
from halos.config.content_hashes import changes_record
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.config.values import as_argument
from halos.distributed.launch import require_same_on_all_ranks
from halos.errors import UserError
from halos.hooks.base import Run
from halos.lock import RunLock
from halos.logs import add_log_file
from halos.metrics_file import DAMAGED
from halos.run import header
from halos.rundir import RunDir, is_run

log = logging.getLogger(__name__)

SHARED = "all hosts write into it, so output_root (or run_dir) must lie on a file system that they share"


def begin(config: Config, directory: RunDir, made: Accelerator, total: int, lock: RunLock | None) -> select.Selection:
    """Make the run's directory, or find what it goes on from: one process decides, so that all agree."""
    box: list[Any] = [select.Selection(None, [])]
    taken_over = None
    if made.is_main_process and lock:
        directory.path.mkdir(parents=True, exist_ok=True)
        taken_over = lock.acquire(directory.next_attempt(), wait=bool(config.resume))
    if made.is_main_process and config.resume:
        _refuse_unwritable(directory)
        box = [select.select_checkpoint(directory, directory.requested_checkpoint(config.resume))]
        _refuse_behind(config, directory, box[0].path, total)
        _refuse_no_start(config, box[0].path)
    elif made.is_main_process:
        directory.create(overwrite=config.overwrite)
        directory.write_config(run_config.dump(config))
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    seen = is_run(directory.path)
    require_same_on_all_ranks(
        made, "run directory", str(seen), None if seen else f"{directory.path} is not there on this host: {SHARED}"
    )
    add_log_file(directory.log_of(made.process_index))
    if taken_over:
        log.warning(taken_over)
    return box[0]


def look(config: Config, directory: RunDir, total: int) -> None:
    """Say what a resumed run would go on from. Raises UserError as `begin` does, and touches nothing."""
    _refuse_unwritable(directory)
    source = select.preview_selection(directory, directory.requested_checkpoint(config.resume))
    _refuse_behind(config, directory, source.path, total)
    _refuse_no_start(config, source.path)
    for line in source.passed_over:
        log.warning(line)
    log.info("would go on from %s", f"checkpoints/{source.path.name}" if source.path else "nothing: step 0")


def _refuse_unwritable(directory: RunDir) -> None:
    """Raises UserError where the next save would fail: tried, since permissions do not say all."""
    place = directory.checkpoints if directory.checkpoints.is_dir() else directory.path
    trial = place / f"{HIDDEN}trial"
    try:
        confined.remove(trial)
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise UserError(f"{place} cannot be written into, and a run that goes on saves there: {error.strerror}") from error


def _refuse_no_start(config: Config, source: Path | None) -> None:
    """A run that has a checkpoint of its own no longer needs the one that it began with."""
    if source is None:
        paths.check_optimizer_state(config)


def _refuse_behind(config: Config, directory: RunDir, source: Path | None, total: int) -> None:
    """Raises UserError where a run is to end before where it is, or where nothing is left to go on from."""
    result = directory.read_result() or {}
    done = result.get("status") == "finished" and directory.final.is_dir() and not directory.requested_checkpoint(config.resume)
    if done and source is None:
        raise UserError(
            f"{directory.path} is finished and has kept no checkpoint to train on from (checkpoint.every=null?): begin a new run"
            f" with {as_argument('model.name_or_path', directory.final)}"
        )
    step = max(select.step_of(source) if source else 0, int(result.get("step") or 0) if done else 0)
    if step > total:
        raise UserError(
            f"{directory.path} is at step {step}, and is to end at {total}: give more train.steps, or name an earlier checkpoint,"
            f" resume={directory.checkpoints}/step-N"
        )


def record(
    current: Run, typed: list[str], source: select.Selection, changed: Sequence[Change], content_changed: Sequence[Change]
) -> None:
    """attempts/NNN.yaml of this start, and what a run that goes on leaves behind. What changed are keys, or what they name."""
    directory, resume = current.directory, current.config.resume
    for line in source.passed_over:
        log.warning(line)
    went_on = f"checkpoints/{source.path.name}" if source.path else "nothing: step 0"
    if resume:
        log.info("going on from %s%s", went_on, _not_known_to_be_good(directory, current.step))
        _tell_changes([*changed, *content_changed], current.step)
        select.record_commit(directory, source.path)  # before what was saved behind it is out of sight
        place, moved = directory.set_aside(current.step, final=directory.requested_checkpoint(resume) is not None)
        if moved:
            log.warning("set aside in %s, since the run goes on from before: %s", place, ", ".join(moved))
    how = current.strategy.name
    attempt = header.attempt(typed, current.accelerator, how=how, source=went_on, total_steps=current.total_steps)
    of_files = [each for each in changed if each.key.endswith("(content)")]
    of_keys = [each for each in changed if each not in of_files]
    altered = changes_record(changed=of_keys, content_changed=[*of_files, *content_changed])
    stands_on = current.content.record() if current.content is not None else {}
    directory.start_attempt({**attempt, **altered, "passed_over": source.passed_over, **stands_on})
    if damaged := directory.truncate_metrics(current.step if source.path else -1):
        log.warning("%d lines of metrics.jsonl were damaged, and stand in %s now", damaged, DAMAGED)
    directory.write_result("running", current.step, {})


def _not_known_to_be_good(directory: RunDir, step: int) -> str:
    """The checkpoints up to the one of `step` that no later step has been finite with so far."""
    names = [select.name_of(number) for number in known_good.not_known_good(directory) if number <= step]
    return f" ({', '.join(names)}: not known to be good, as no step has come after it yet)" if names else ""


def _tell_changes(changed: Sequence[Change], step: int) -> None:
    if safe := [str(change) for change in changed if change.why is None]:
        log.info("changed: %s", ", ".join(safe))
    if others := [change.explained for change in changed if change.why is not None]:
        log.warning("CHANGED WHAT THE RUN COMPUTES, from step %d on: %s", step, ", ".join(others))
