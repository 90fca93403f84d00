"""What a run proves of its forward, and where it says so: its header, forward_report.json."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from halos import confined
from halos.config.bind import LossSpec
from halos.distributed.launch import require_same_on_all_ranks
from halos.errors import UserError
from halos.hooks.base import Run
from halos.logps.model import bare
from halos.logps.plan import plan_for
from halos.models.load import attention
from halos.prove import loaded_model
from halos.prove.trial import Check, Trial
from halos.prove.verdict import Verdict, refuse_failed, verdict_on
from halos.run import models
from halos.rundir import REPORT, RunDir


def of_copies(loss: LossSpec, shelf: models.Shelf, model: nn.Module, named: Path | None) -> Verdict:
    """The verdict on small copies of the policy, and of the reference that the config names: one process proves, and the others
    on its host find it in the cache. Raises UserError on every process where a check does not hold."""
    config, machine = shelf.config, shelf.made
    trial = Trial(
        config=bare(model).config,
        peft=asdict(config.peft) if isinstance(model, PeftModel) else None,
        attention=_attention(shelf, shelf.dtype),
        reward=loss.inputs.head == "score",
        valued=loss.inputs.head == "value",
        refers=loss.needs_reference and named is None and isinstance(model, PeftModel),
        longest=config.train.max_length,
        dtype=shelf.dtype,
        autocast=machine.mixed_precision == "bf16",
        device=machine.device,
        temperature=config.train.temperature,
    )
    if config.train.prove == "off":
        return Verdict(plan_for(trial.config, reward=trial.reward, attention=trial.attention, longest=trial.longest), [])
    trials = [trial, *([_of_reference(shelf, trial, named)] if named is not None else [])]
    cache, again = Path(config.cache_dir).expanduser(), config.train.prove == "always"
    problem, verdicts = None, list[Verdict]()
    try:
        verdicts = [verdict_on(each, cache, again=again) for each in trials] if machine.is_main_process else []
    except UserError as error:
        if not isinstance(machine, Accelerator):
            raise
        problem = str(error)
    if isinstance(machine, Accelerator):
        require_same_on_all_ranks(machine, "forward", "", problem)
    return (verdicts or [verdict_on(each, cache, again=False) for each in trials])[0]


def _attention(shelf: models.Shelf, dtype: torch.dtype) -> str:
    half = dtype is torch.bfloat16 or shelf.made.mixed_precision == "bf16"
    return attention(shelf.config.model.attention, half=half, device=shelf.made.device)


def _of_reference(shelf: models.Shelf, trial: Trial, named: Path) -> Trial:
    dtype = shelf.reference_dtype
    return Trial(
        config=bare(models.structure_of_reference(shelf, named)).config, peft=None, attention=_attention(shelf, dtype),
        reward=False, valued=False, refers=False, longest=trial.longest, dtype=dtype, autocast=trial.autocast,
        device=trial.device, temperature=trial.temperature,
    )  # fmt: skip


def of_start(run: Run, verdict: Verdict) -> None:
    """One row through the module as it is spread over the processes, at every start; and the report of all that was proved.

    Raises UserError on every process where one's numbers are not the model's own.
    """
    config, found, problem = run.config, list[Check](), None
    if config.train.prove != "off":
        settings = {"temperature": config.train.temperature, "longest": run.max_length}
        found = loaded_model.prove(run.module, run.strategy, run.tokenizer, **settings)
        try:
            refuse_failed(found, "the model as it is spread over the processes")
        except UserError as error:
            problem = str(error)
        require_same_on_all_ranks(run.accelerator, "forward", "", problem)
    if run.main:
        _write(run.directory, {"prove": config.train.prove, **verdict.report(), "start": [asdict(check) for check in found]})


def _write(directory: RunDir, report: dict[str, object]) -> None:
    confined.write_whole(directory.path / REPORT, json.dumps(report, indent=1) + "\n", within=directory.path)
