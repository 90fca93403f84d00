"""Start or resume a run: its directory, the checkpoint that it resumes from, and the record of this start."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator

from halos import confined
from halos.checkpoint import known_good, select
from halos.checkpoint.commit import HIDDEN
from halos.config import paths, run_config
from halos.config.content_hashes import changes_record, log_changes
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.config.values import as_argument
from halos.distributed.agreement import require_same_on_all_ranks
from halos.errors import UserError
from halos.hooks.base import Run
from halos.lock import RunLock
from halos.logs import add_log_file
from halos.metrics_file import DAMAGED
from halos.run import header
from halos.rundir import RunDir, is_run

log = logging.getLogger(__name__)

NOT_SHARED = "all hosts write into it, so output_root (or run_dir) must be on a file system that they share"


def prepare_directory(
    config: Config, directory: RunDir, accelerator: Accelerator, total: int, lock: RunLock | None
) -> select.Selection:
    """Create the run's directory, or select the checkpoint to resume from: rank 0 decides and broadcasts."""
    box: list[Any] = [select.Selection(None, [])]
    taken_over = None
    if accelerator.is_main_process and lock:
        directory.path.mkdir(parents=True, exist_ok=True)
        taken_over = lock.acquire(directory.next_attempt(), wait=bool(config.resume))
    if accelerator.is_main_process and config.resume:
        _refuse_unwritable(directory)
        box = [select.select_checkpoint(directory, directory.requested_checkpoint(config.resume))]
        _refuse_too_few_steps(config, directory, box[0].path, total)
        _check_initial_state(config, box[0].path)
    elif accelerator.is_main_process:
        directory.create(overwrite=config.overwrite)
        directory.write_config(run_config.dump(config))
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    exists = is_run(directory.path)
    problem = None if exists else f"{directory.path} does not exist on this host: {NOT_SHARED}"
    require_same_on_all_ranks(accelerator, "run directory", str(exists), problem)
    add_log_file(directory.log_of(accelerator.process_index))
    if taken_over:
        log.warning(taken_over)
    return box[0]


def report_checkpoint(config: Config, directory: RunDir, total: int) -> None:
    """Log which checkpoint a resume would continue from, and leave the run as it is. Raises UserError where `prepare_directory`
    would, except that a checkpoint which an interrupted save moved aside is not checked."""
    _refuse_unwritable(directory)
    source = select.preview_selection(directory, directory.requested_checkpoint(config.resume))
    _refuse_too_few_steps(config, directory, source.path, total)
    _check_initial_state(config, source.path)
    for line in source.passed_over:
        log.warning(line)
    log.info("would resume from %s", f"checkpoints/{source.path.name}" if source.path else "nothing: step 0")


def _refuse_unwritable(directory: RunDir) -> None:
    """Raises UserError if the run's directory is not writable, by trying: permissions do not tell everything."""
    target = directory.checkpoints if directory.checkpoints.is_dir() else directory.path
    trial = target / f"{HIDDEN}trial"
    try:
        confined.remove(trial)
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise UserError(f"{target} is not writable, and a resumed run saves there: {error.strerror}") from error


def _check_initial_state(config: Config, source: Path | None) -> None:
    """Check optim.init_from, which a run with a checkpoint of its own no longer needs."""
    if source is None:
        paths.check_optimizer_state(config)


def _refuse_too_few_steps(config: Config, directory: RunDir, source: Path | None, total: int) -> None:
    """Raises UserError if a run is past its last step already, or is finished and has no checkpoint to continue from."""
    result = directory.read_result() or {}
    done = result.get("status") == "finished" and directory.final.is_dir() and not directory.requested_checkpoint(config.resume)
    if done and source is None:
        raise UserError(
            f"{directory.path} is finished and has no checkpoint to continue from (none was saved; checkpoint.at_end=true saves"
            f" the last step's): start a new run with {as_argument('model.name_or_path', directory.final)}"
        )
    step = max(select.step_of(source) if source else 0, int(result.get("step") or 0) if done else 0)
    if step > total:
        raise UserError(
            f"{directory.path} is at step {step}, and would end at {total}: set more train.steps, or name an earlier checkpoint,"
            f" resume={directory.checkpoints}/step-N"
        )


def record_attempt(
    current: Run, overrides: list[str], source: select.Selection, changed: Sequence[Change], content_changed: Sequence[Change],
    settled: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write attempts/NNN.yaml, and set aside what a resumed run leaves behind. `changed` are keys, or contents of files;
    `settled` is what keys mean whose value the run has chosen."""
    directory, resume = current.directory, current.config.resume
    for line in source.passed_over:
        log.warning(line)
    resumed_from = f"checkpoints/{source.path.name}" if source.path else "nothing: step 0"
    if resume:
        log.info("resuming from %s%s", resumed_from, _not_known_to_be_good(directory, current.step))
        log_changes([*changed, *content_changed], f"step {current.step}")
        select.record_commit(directory, source.path)  # before later checkpoints are set aside
        aside, moved = directory.set_aside(current.step, final=directory.requested_checkpoint(resume) is not None)
        if moved:
            log.warning("set aside in %s, since the run resumes from before: %s", aside, ", ".join(moved))
    attempt = header.attempt_record(
        overrides, current.accelerator, strategy=current.strategy.name, source=resumed_from, total_steps=current.total_steps
    )
    contents = [each for each in changed if each.key.endswith("(content)")]
    keys = [each for each in changed if each not in contents]
    altered = changes_record(changed=keys, content_changed=[*contents, *content_changed])
    hashes = current.content.record() if current.content is not None else {}
    directory.write_result("running", current.step, {})  # first: "finished" beside a record of more steps would say they are done
    directory.start_attempt({**attempt, **settled, **altered, "passed_over": source.passed_over, **hashes})
    if damaged := directory.truncate_metrics(current.step if source.path else -1):
        log.warning("%d lines of metrics.jsonl were damaged, and were moved to %s", damaged, DAMAGED)


def _not_known_to_be_good(directory: RunDir, step: int) -> str:
    """List the checkpoints up to `step` that no finite step is known to have followed."""
    names = [select.name_of(number) for number in known_good.not_known_good(directory) if number <= step]
    return f" ({', '.join(names)}: not known to be good, as no finite step has come after yet)" if names else ""
