"""Prove a run's forward pass, on small copies and on the loaded model, and write forward_report.json."""

import json
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from halos import confined
from halos.config.bind import LossSpec
from halos.distributed.agreement import require_same_on_all_ranks
from halos.errors import UserError
from halos.hooks.base import Run
from halos.logps.model import bare
from halos.logps.plan import plan_for
from halos.prove import loaded_model
from halos.prove.small_copy import Check, ForwardSpec
from halos.prove.verdict import Verdict, refuse_failed, verdict_on
from halos.run import models
from halos.rundir import REPORT, RunDir


def prove_copies(loss: LossSpec, loader: models.ModelLoader, model: nn.Module, reference: Path | None) -> Verdict:
    """Prove the forward pass on small copies of the policy and of the configured reference. Rank 0 proves, the other ranks read
    the verdict from the cache, or prove it on a host without it. Raises UserError on every rank if a check fails."""
    config, machine = loader.config, loader.machine
    spec = ForwardSpec(
        config=bare(model).config,
        peft=asdict(config.peft) if isinstance(model, PeftModel) else None,
        attention=loader.attention(loader.dtype),
        reward=loss.reward,
        valued=loss.inputs.head == "value",
        refers=loss.needs_reference and reference is None and isinstance(model, PeftModel),
        longest=config.train.max_length,
        dtype=loader.dtype,
        autocast=machine.mixed_precision == "bf16",
        device=machine.device,
        temperature=config.train.temperature,
    )
    if config.train.prove == "off":
        return Verdict(plan_for(spec.config, reward=spec.reward, attention=spec.attention, longest=spec.longest), [])
    specs = [spec, *([_reference_spec(loader, spec, reference)] if reference is not None else [])]
    cache, again = Path(config.cache_dir).expanduser(), config.train.prove == "always"
    problem, verdicts = None, list[Verdict]()
    try:
        verdicts = [verdict_on(each, cache, again=again) for each in specs] if machine.is_main_process else []
    except UserError as error:
        if not isinstance(machine, Accelerator):
            raise
        problem = str(error)
    if isinstance(machine, Accelerator):
        require_same_on_all_ranks(machine, "forward", "", problem)
    return (verdicts or [verdict_on(each, cache, again=False) for each in specs])[0]


def _reference_spec(loader: models.ModelLoader, spec: ForwardSpec, reference: Path) -> ForwardSpec:
    dtype = loader.reference_dtype
    return ForwardSpec(
        config=bare(models.reference_structure(loader, reference)).config, peft=None, attention=loader.attention(dtype),
        reward=None, valued=False, refers=False, longest=spec.longest, dtype=dtype, autocast=spec.autocast,
        device=spec.device, temperature=spec.temperature,
    )  # fmt: skip


def prove_loaded(run: Run, verdict: Verdict) -> None:
    """Run one example through the loaded, distributed module at every start, and write the report of all checks.

    Raises UserError on every rank if one rank's numbers are not the model's own.
    """
    config, checks, problem = run.config, list[Check](), None
    if config.train.prove != "off":
        settings = {"temperature": config.train.temperature, "longest": run.max_length}
        checks = loaded_model.prove(run.module, run.strategy, run.tokenizer, **settings)
        try:
            refuse_failed(checks, "the model as it is distributed over the ranks")
        except UserError as error:
            problem = str(error)
        require_same_on_all_ranks(run.accelerator, "forward", "", problem)
    if run.main:
        _write(run.directory, {"prove": config.train.prove, **verdict.report(), "start": [asdict(check) for check in checks]})


def _write(directory: RunDir, report: dict[str, object]) -> None:
    confined.write_whole(directory.path / REPORT, json.dumps(report, indent=1) + "\n", within=directory.path)
