"""What is said and recorded at the start of a run: the header people read, the attempt's record."""

import logging
import os
import platform
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from halos.config.bind import LossSpec
from halos.data.collate import num_cut_mismatches
from halos.data.dataset import Dataset
from halos.distributed.deepspeed import num_elements
from halos.distributed.strategy import name_of
from halos.hooks.base import Run
from halos.trainers.deal import Split
from halos.trainers.schedule import warmup_steps
from halos.types import Judgement
from halos.versions import versions

log = logging.getLogger(__name__)


def attempt(typed: list[str], made: Accelerator, *, strategy: str, source: str, total_steps: int) -> dict[str, Any]:
    """The record of one start: what was typed, with which versions, on how many processes, and where it went on from."""
    return {
        "overrides": typed,
        "resumed_from": source,
        "total_steps": total_steps,
        "world_size": made.num_processes,
        "strategy": strategy,
        "device": str(made.device),
        "mixed_precision": made.mixed_precision,
        "threads": torch.get_num_threads(),
        "launched_by": os.environ.get("TORCHELASTIC_RUN_ID") and "accelerate or torchrun",
        **versions(),
    }


def _bfloat16_is_emulated() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def _count(model: nn.Module, *, trained: bool) -> int:
    return sum(num_elements(p) for p in model.parameters() if p.requires_grad or not trained)


def _short(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def write(
    run: Run, loss: LossSpec, data: list[tuple[str, str]], train: Split, held_out: Split | None, reference: nn.Module | None
) -> None:
    """A few lines: model, parameters, data after filtering, steps, run directory."""
    config, model = run.config, run.model
    made = run.accelerator
    trained, total = _count(model, trained=True), _count(model, trained=False)
    other = config.reference.name_or_path or "a frozen copy"
    against = "" if not loss.needs_reference else ", reference: " + ("its own base" if reference is None else other)
    log.info("loss       %s %s", loss.name, "  ".join(f"{k}={v}" for k, v in loss.settings.items()))
    log.info(
        "model      %s (%s)%s", config.model.name_or_path, str(next(model.parameters()).dtype).removeprefix("torch."), against
    )
    log.info("parameters %s trained of %s (%.2f%%)", _short(trained), _short(total), 100 * trained / total)
    for name, line in data:
        log.info("%-10s %s", name, line)
    for split in (train, held_out):
        if split and isinstance(split.rows, Dataset) and split.rows.kind is Judgement:
            log.info("%-10s %.0f%% of them desirable", "", 100 * split.rows.desirable.mean())
        if split and isinstance(split.rows, Dataset) and split.partners is not None:
            rows = split.rows
            cut = num_cut_mismatches(rows.prompt_lengths, rows.lengths[:, 0], split.partners, config.train.max_length)
            log.info("%-10s paired with answers to other prompts for the KL, %d of them cut at max_length", "", cut)
    if isinstance(train.rows, Dataset) and train.rows.kind is Judgement:
        _warn_of_labels(loss, train.rows)
    where = f"{made.num_processes} process{'es' if made.num_processes > 1 else ''} on {made.device.type}"
    how = name_of(run.module)
    where += "" if how == "alone" else f", {how}"
    micro = min(config.train.microbatch_size, -(-config.train.batch_size // made.num_processes))
    steps = f"{run.total_steps}, each of {config.train.batch_size} items, {micro} at a time"
    log.info("steps      %s, %s", steps, where)
    if made.mixed_precision == "bf16" and made.device.type == "cpu" and _bfloat16_is_emulated():
        log.warning(
            "this processor has no bfloat16: a step takes many times as long as in float32 (train.precision, model.dtype)"
        )
    if warmup_steps(config.schedule, run.total_steps) >= run.total_steps:
        log.warning(
            "schedule.warmup=%g is as long as the run: the learning rate falls before it has risen to optim.lr",
            config.schedule.warmup,
        )
    log.info("run        %s", run.directory.path)


def _warn_of_labels(loss: LossSpec, rows: Dataset) -> None:
    """Say where one kind of label outweighs the other: KTO's authors keep the ratio of their weights within 1 to 1.5."""
    count, desirable = len(rows), int(rows.desirable.sum())
    if desirable in (0, count):
        kind = "desirable" if desirable else "undesirable"
        log.warning("every training example is %s: nothing says what the model should turn away from, or to", kind)
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
