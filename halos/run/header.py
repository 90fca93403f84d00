"""The header of a run in the log, and the record of an attempt."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PretrainedConfig

from halos.config.bind import LossSpec
from halos.config.bind_optim import bind_optimizer, bind_schedule
from halos.config.reference_checks import reads_teacher_columns
from halos.config.schema import Config, Train
from halos.config.values import show
from halos.data.collate import num_truncated_mismatches
from halos.data.dataset import Dataset
from halos.data.dates import date_of, writes_date
from halos.data.encoded import PROMPT_TOO_LONG, TOO_LONG
from halos.distributed.parameters import num_elements
from halos.inspection.findings import Check
from halos.inspection.speed import bfloat16_gain
from halos.logps.compiled import regions_of
from halos.logps.model import bare
from halos.logps.router import has_balancing_loss, weight_in
from halos.models import targets
from halos.reward_kind import RewardKind
from halos.run.models import reference_is_adapter
from halos.run.prepare import PreparedRun, Structure
from halos.run.render import CLOSE, OPEN
from halos.schedules import num_steps
from halos.trainers.humanline import Humanline
from halos.versions import versions

log = logging.getLogger(__name__)

SLOWER = 0.9  # gain below which bfloat16 on a CPU is worth a warning
MANY_LONG = 0.1  # fraction of examples over the longest length from which a warning says so


def attempt_record(
    overrides: list[str], accelerator: Accelerator, *, strategy: str, source: str, total_steps: int
) -> dict[str, Any]:
    """Return the record of one start: overrides, versions, world size, and the checkpoint that it resumed from."""
    return {
        "overrides": overrides,
        "resumed_from": source,
        "total_steps": total_steps,
        "world_size": accelerator.num_processes,
        "strategy": strategy,
        "device": str(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "launched_by": os.environ.get("TORCHELASTIC_RUN_ID") and "accelerate or torchrun",
        **versions(),
    }


def _warn_of_slow_bfloat16(device: torch.device) -> None:
    if (gain := bfloat16_gain(device)) < SLOWER:
        log.warning(
            "this processor multiplies bfloat16 at %s of the rate of float32: train.precision=float32 model.dtype=float32 is"
            " faster, in more memory", f"{gain:.1%}" if gain < 0.1 else f"{gain:.0%}",
        )  # fmt: skip


def _count(model: nn.Module, *, trained: bool) -> int:
    return sum(num_elements(p) for p in model.parameters() if p.requires_grad or not trained)


def _short(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def write(run: PreparedRun, accelerator: Accelerator) -> None:
    """Log a few lines: loss, model, parameters, data after filtering, first example, learning rate, steps, disk, directory."""
    config = run.config
    write_model(config, run.loss, run.structure)
    _log_positions(run)
    if (target := config.trainer["_target_"]) is not None:
        settings = {name: value for name, value in config.trainer.items() if name != "_target_"}
        _log("trainer", f"{target} {_listed(settings, '  ').lstrip()}".rstrip())
    _log_data(run)
    if accelerator.is_main_process:
        write_checks(run.batches.checks)
    write_learning_rate(config, run.batches.total)
    where = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''} on {accelerator.device.type}"
    where += f", {run.strategy.name}" if accelerator.num_processes > 1 or run.strategy.needs_process_group else ""
    micro = _microbatch(config.train, -(-config.train.batch_size // accelerator.num_processes))
    _log("steps", f"{run.batches.total}, each of {config.train.batch_size} items, {micro} at a time, {where}")
    if accelerator.is_main_process and (steps := run.batches.steps()) is not None:
        for name, line in steps.lines():
            _log(name, line)
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu":
        _warn_of_slow_bfloat16(accelerator.device)
    if num_steps(warmup := config.schedule.get("warmup", 0), run.batches.total) >= run.batches.total:
        log.warning("schedule.warmup=%g is as long as the run: the learning rate falls before it has risen to optim.lr", warmup)
    for name, line in run.planned.lines:
        _log(name, line)
    _log("run", str(run.directory.path))


def write_checks(checks: Sequence[Check]) -> None:
    """Log what does not hold, in a line each."""
    found = [finding for check in checks for finding in check.findings]
    holding = sum(not check.findings for check in checks)
    _log("checks", f"{holding} of {len(checks)} hold{'' if found else ', of data and chat template'}")
    for finding in found:
        log.warning("%s", finding.line()) if finding.level == "warning" else _log("", finding.line())


def _microbatch(train: Train, share: int) -> str:
    """What a process computes at a time of its `share` of a batch."""
    items = str(min(train.microbatch_size or share, share))
    if train.microbatch_tokens is None:
        return items
    tokens = (
        "the tokens of train.microbatch_tokens=auto" if train.microbatch_tokens == "auto" else f"{train.microbatch_tokens} tokens"
    )
    return f"up to {items} and {tokens}"


def _loss(config: Config, loss: LossSpec) -> str:
    """The choice of config/loss, or the function where it is not a choice's own, and its keys."""
    return f"{config.loss_choice or loss.name} {_listed(loss.settings, '  ').lstrip()}".rstrip()


def _log(name: str, line: str) -> None:
    log.info("%-10s %s", name, line)


def write_model(config: Config, loss: LossSpec, structure: Structure) -> None:
    """Log the loss, the model and the reference, the plan of the forward pass, and the trained parameters."""
    _log("loss", _loss(config, loss))
    named = "what the rows have of a teacher" if reads_teacher_columns(config, loss) else _reference(config)
    suffix = f", reference: {named}" if loss.needs_reference else ""
    trained, total = (_count(structure.model, trained=only) for only in (True, False))
    dtype = str(next(structure.model.parameters()).dtype).removeprefix("torch.")
    if humanline := Humanline.of(config.humanline):
        _log("", f"of log(policy / reference) of a token within {humanline.low:g} and {humanline.high:g} (humanline)")
    _log("model", f"{config.model.name_or_path} ({dtype}){suffix}")
    if day := date_of(structure.tokenizer):
        writes = "writes" if writes_date(structure.tokenizer, str(structure.tokenizer.chat_template)) else "may write"
        _log("date", f"{day}, which the chat template {writes} in all of this run and its resumes (data.date)")
    _log("forward", structure.verdict.line)
    if config.train.compile:
        _log("compiled", f"{', '.join(sorted({type(each).__name__ for each in regions_of(structure.model)}))}, when first called")
    if config.train.working_weights == "step":
        _log("weights", "float32, cast to bfloat16 once a step")
    _log("parameters", f"{_short(trained)} trained of {_short(total)} ({100 * trained / total:.2f}%)")
    _warn_of_half_weights(structure.model)
    if config.peft.name == "lora" and (others := targets.unmatched(structure.model, config.peft.target_modules)):
        log.warning("peft.target_modules: %s matches no layer of this model", ", ".join(others))
    for number, line in enumerate(targets.lines(structure.model)):
        _log("" if number else "adapter", line)
    if has_balancing_loss(settings := bare(structure.model).config):
        _log("router", _balancing(settings, config.train.router_aux_loss))


def _warn_of_half_weights(model: nn.Module) -> None:
    """Say what is lost where trained weights are held in half precision: an update is added to them in it."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad and parameter.is_floating_point()}
    if half := next((kind for kind in kinds if kind in (torch.bfloat16, torch.float16)), None):
        name, parts = str(half).removeprefix("torch."), round(2 / torch.finfo(half).eps)
        log.warning(
            "the trained weights are held in %s (model.dtype): an update of less than a %dth of a weight is rounded away;"
            " model.dtype=float32 train.precision=bfloat16 computes in bfloat16 too and keeps every update", name, parts,
        )  # fmt: skip


def _reference(config: Config) -> str:
    known, own = config.reference.cache == "always", "a frozen copy"
    if config.peft.name == "lora":
        own = "the adapter it starts with" if reference_is_adapter(config) else "its own base"
    elif known:
        own = "its own start"
    every, weight = config.reference.sync_every, config.reference.sync_weight
    steps = "at every step" if every == 1 else f"every {every} steps"
    how = "replaced by" if weight == 1 else f"moved by {weight:g} of the way to"
    moves = f", {how} the policy {steps}" if every else ""
    return f"{config.reference.name_or_path or own}{', its log-probs computed once' if known else moves}"


def write_learning_rate(config: Config, total: int | None) -> None:
    """Log the schedule over `total` steps (None if not known yet) and the optimizer."""
    schedule, optimizer = bind_schedule(config.schedule, config.plugins), bind_optimizer(config.optim, config.plugins)
    others = dict(schedule.settings)
    final, warmup = others.pop("final", None), others.pop("warmup", None)
    line = f"{config.optim['lr']:g}, {schedule.name}{_listed(others)}"
    line += "" if final is None else f" down to {final * config.optim['lr']:g}"
    if warmup is not None:
        is_known = total is not None or warmup >= 1
        steps = num_steps(warmup, total or 0)
        known = f"{steps} step{'' if steps == 1 else 's'}"
        line += f" after a warm-up of {known if is_known else f'{warmup:.0%} of all steps'}" if steps or not is_known else ""
    _log("rate", f"{line}, by {optimizer.name}")
    if optimizer.loraplus_lr_ratio:
        _log("", f"{optimizer.loraplus_lr_ratio:g} times as much for LoRA's B matrices")
    for pattern, rate in optimizer.lr_by_name.items():
        _log("", f"{rate:g} for parameters named {pattern}")


def _listed(settings: Mapping[str, Any], gap: str = " ") -> str:
    """Keys as they would be typed: null, not None, and a line end as \\n."""
    values = {name: repr(value)[1:-1] if isinstance(value, str) else show(value) for name, value in settings.items()}
    return "".join(f"{gap}{name}={value}" for name, value in values.items())


def _log_positions(run: PreparedRun) -> None:
    config, limits = run.config, run.structure.limits
    if run.structure.max_length < config.train.max_length:
        _log("positions", f"{limits.hard}, the longest sequence: train.max_length={config.train.max_length} counts as that")
    elif limits.configured is not None and limits.configured < config.train.max_length:
        for name, split in run.batches.splits:
            if isinstance(split.rows, Dataset) and (longer := int((split.rows.lengths.max(1) > limits.configured).sum())):
                log.warning(
                    "%d examples (%s) are longer than the %d positions that the model was trained with: it may fail beyond them"
                    " (train.max_length)", longer, name, limits.configured,
                )  # fmt: skip


def _balancing(config: PretrainedConfig, weight: float | None) -> str:
    """Describe the weight of a mixture-of-experts' balancing loss."""
    if weight is not None:
        return f"its balancing loss weighs {weight:g} (train.router_aux_loss)" if weight else "no balancing loss"
    if weight := weight_in(config):
        return f"its balancing loss weighs {weight:g}, as the model's config says"
    return "no balancing loss, as the model's config says; train.router_aux_loss=0.001 would add it"


def _log_data(run: PreparedRun) -> None:
    config = run.config
    for name, line in run.batches.lines():
        _log(name, line)
    for name, split in run.batches.splits:
        rows = split.rows
        if not isinstance(rows, Dataset):
            continue
        _warn_of_lengths(run, name, rows)
        if "desirable" in rows.labels:
            _log("", f"{100 * rows.labels['desirable'].mean():.0f}% of them desirable ({name})")
        if isinstance(split.mismatched_partners, np.ndarray):  # a live batch has others
            longest = run.structure.max_length
            truncated = num_truncated_mismatches(rows.prompt_lengths, rows.lengths[:, 0], split.mismatched_partners, longest)
            _log("", f"paired with answers to other prompts for the KL, {truncated} of them truncated at max_length ({name})")
        if "desirable" in rows.labels and name == "train":
            _warn_of_labels(run.loss, rows)
    scored = {None: f"{OPEN}scored{CLOSE}", RewardKind.OUTCOME: "its score is read at the end of each completion",
              RewardKind.PROCESS: f"steps are scored {OPEN}here{CLOSE}"}[run.planned.reward]  # fmt: skip
    if config.objective.metric in run.batches.unmeasured:
        log.warning(
            "%s needs both labels, and all rows it is measured on have one: it is left out, and no checkpoint is compared by it",
            config.objective.metric,
        )
    _log("first row", f"as the model sees it; {scored}" if run.batches.splits else "as the sampler gets it")
    for name, text in run.batches.first_example(run.structure.tokenizer):
        _log(f"  {name}", text)


def _warn_of_lengths(run: PreparedRun, name: str, rows: Dataset) -> None:
    """Warn where much of the data is left out for its length: the counts above do not say at which length, nor what to do."""
    config, limit = run.config.train, run.structure.max_length
    long = sum(counts.dropped.get(reason, 0) for counts in rows.report for reason in (TOO_LONG, PROMPT_TOO_LONG))
    if long and long >= MANY_LONG * (long + len(rows)):
        what = "raise it, or train.truncation=truncate" if limit == config.max_length else "train.truncation=truncate"
        log.warning(
            "%.0f%% of the examples (%s) are longer than %s=%d and left out: %s", 100 * long / (long + len(rows)), name,
            "train.max_length" if limit == config.max_length else "the model's positions", limit, what,
        )  # fmt: skip


def _warn_of_labels(loss: LossSpec, rows: Dataset) -> None:
    """Warn if one label outweighs the other: KTO's authors keep the ratio of their total weights within 1 to 1.5."""
    count, desirable = len(rows), int(rows.labels["desirable"].sum())
    if desirable in (0, count):  # as the checks of the data say
        return
    good, bad = (loss.settings.get(key) for key in ("desirable_weight", "undesirable_weight"))
    if not good or not bad:
        return
    ratio = good * desirable / (bad * (count - desirable))
    if not 0.95 <= ratio <= 1.55:
        balanced = bad * (count - desirable) / desirable
        log.warning(
            "desirable examples weigh %.2f times the undesirable, where 1 to 1.5 is advised (arXiv:2402.01306):"
            " loss.desirable_weight=%.2g makes them equal", ratio, balanced,
        )  # fmt: skip
