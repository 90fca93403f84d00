"""Whether the reference's log-probs are computed once or at every step, and what they depend on."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from halos.checkpoint.state import load_reference_values, random_state, restore_random_state, saved_reference
from halos.checkpoint.weights import load_shards
from halos.config.arithmetic_version import VISITED_ROWS
from halos.config.bind import LossSpec
from halos.config.reference_checks import has_reference, reads_teacher_columns
from halos.config.schema import Config
from halos.confined import expanded
from halos.distributed.agreement import from_rank_0
from halos.distributed.moving_reference import MovingReference
from halos.distributed.parameters import local_part
from halos.errors import UserError
from halos.hashes import source_hash
from halos.hooks.base import Run
from halos.logps import compiled
from halos.logps.model import ModelWithHead
from halos.prove import verdict
from halos.run import models
from halos.run.batch_source import BatchSource, DatasetSource
from halos.run.prepare import PreparedRun
from halos.trainers.reference import ReferenceCache
from halos.versions import versions

CODE = ("models/load.py", "trainers/reference.py", "trainers/reference_rows.py", "trainers/logps_table.py")  # which it passes


def decided(prepared: PreparedRun) -> PreparedRun:
    """Return the run with the decision in its configuration, which it records: a resume keeps it. Raises as `decision` does."""
    config = prepared.config
    made = replace(config.reference, cache=decision(config, prepared.loss, prepared.batches))
    return replace(prepared, config=replace(config, reference=made))


def decision(config: Config, loss: LossSpec, batches: BatchSource) -> str:
    """Return reference.cache, of which `auto` becomes always or never where the loss has a reference. Raises UserError for
    `always` where nothing can be computed beforehand."""
    asked, export = config.reference.cache, config.reference.export
    if complaint := _complaint(config, loss):
        raise UserError(complaint)
    if not loss.needs_reference or asked == "never":
        return asked
    if reads_teacher_columns(config, loss):
        return "never"
    impossible, wanted = _why_impossible(config, loss, batches), asked == "always" or export is not None
    if impossible and wanted:
        key = "reference.cache=always" if export is None else f"reference.export={export}"
        raise UserError(f"{key}: {impossible}: leave it out")
    is_live = impossible is not None or (not wanted and (_costs_nothing(config, batches) or _has_own_code(config, loss)))
    return "never" if is_live else "always"


def _has_own_code(config: Config, loss: LossSpec) -> bool:
    """Return whether code of the user's own may read rows that cannot be known beforehand."""
    return loss.has_own_rows or config.trainer["_target_"] is not None


def _complaint(config: Config, loss: LossSpec) -> str | None:
    """Return why keys about what a teacher says do not fit the loss and each other; None where they do."""
    by_rows, cache, export = reads_teacher_columns(config, loss), config.reference.cache, config.reference.export
    if by_rows and cache == "always":
        return "reference.cache=always: the rows have what the teacher says: leave it out"
    if export is None:
        return None
    if by_rows or not loss.candidates:
        why = "the rows have that already" if by_rows else f"loss={loss.name} has no teacher"
        return f"reference.export={export} writes what a teacher says of the rows, and {why}: leave it out"
    return f"reference.export={export} needs reference.cache=always, not never" if cache == "never" else None


def _why_impossible(config: Config, loss: LossSpec, batches: BatchSource) -> str | None:
    if config.reference.sync_every is not None:
        return f"the reference moves (reference.sync_every={config.reference.sync_every})"
    if config.data.stream:
        return "rows of a stream are not known before they are trained on"
    if batches.steps_per_epoch is None:
        return "a live loop learns from what it has just sampled, which nothing can know beforehand"
    if not loss.on_rollouts and (loss.inputs.head != "language" or loss.inputs.token_statistics):
        return f"{loss.name} reads more of its reference than log-probs"
    return None


def _costs_nothing(config: Config, batches: BatchSource) -> bool:
    """Return whether a reference at every step takes no memory, and each row is trained on once."""
    own = config.peft.name == "lora" and config.reference.name_or_path is None
    return own and batches.steps_per_epoch is not None and batches.total <= batches.steps_per_epoch


def opened(
    prepared: PreparedRun, current: Run, accelerator: Accelerator, version: int, checkpoint: Path | None
) -> tuple[nn.Module | None, ReferenceCache | None]:
    """Return the reference model of a run that computes it at every step, or else where its log-probs are kept; neither where the
    policy itself is the reference. `version` is that of the run's arithmetic; `checkpoint` the one that it resumes from.
    One that moves is the run's `moving_reference` too."""
    if not has_reference(prepared.config, prepared.loss):
        return None, None
    if prepared.config.reference.sync_every is not None:
        return _open_moving(prepared, current, saved_reference(checkpoint)), None
    if prepared.config.reference.cache != "always":
        return _load(prepared, current), None
    facts, is_start = (
        from_rank_0(accelerator, partial(_facts, prepared, version)),
        checkpoint is None and prepared.structure.reference is None,
    )
    start = _traces(current) if is_start and prepared.config.peft.name == "none" else None
    load = partial(_load_for_a_pass, prepared, current, start)
    return None, ReferenceCache(
        expanded(prepared.config.cache_dir), facts, load, visited(prepared) if version >= VISITED_ROWS else None
    )


def visited(prepared: PreparedRun) -> np.ndarray | None:
    """Return the items of the training data that the run's steps train on, ascending, where these are at most half of it and
    no more is read of the reference; else None."""
    config, loss, batches = prepared.config, prepared.loss, prepared.batches
    reads_more = loss.on_rollouts or config.reference.export is not None or _has_own_code(config, loss)
    if reads_more or not isinstance(batches, DatasetSource):
        return None
    if not 0 < batches.total <= batches.order.batches_per_epoch:
        return None
    items = np.unique(np.concatenate([batches.order.batch(step) for step in range(batches.total)]))
    return items if 2 * len(items) <= len(batches.train.rows) else None


def _load(prepared: PreparedRun, current: Run, saved: Path | None = None) -> nn.Module | None:
    """The reference model; with the weights in `saved` if a checkpoint has them."""
    structure, strategy = prepared.structure, prepared.strategy
    model = models.load_reference(structure.loader, current.model, structure.reference, empty=saved is not None)
    models.teach(model, current.model, prepared.loss.candidates)
    fill = partial(load_shards, saved, strategy) if saved is not None else None
    if model is None:
        return None
    if prepared.config.train.compile:
        compiled.compile_regions(model, like=current.module)
    return strategy.wrap_frozen(model, fill)


def _open_moving(prepared: PreparedRun, current: Run, saved: Path | None) -> nn.Module | None:
    """The reference model of a run whose reference moves, as `saved`; None where the policy has the reference's values."""
    settings = prepared.config.reference
    frozen, every = _load(prepared, current, saved), settings.sync_every
    assert every is not None
    if saved is not None and frozen is None:
        for part in current.module.modules():
            if isinstance(part, ModelWithHead):
                load_reference_values(saved, part.reference_values)
    current.moving_reference = MovingReference(
        current.strategy, current.module, frozen, every=every, weight=settings.sync_weight, has_moved=saved is not None
    )
    return frozen


def _load_for_a_pass(prepared: PreparedRun, current: Run, start: list[tuple[int, float]] | None) -> nn.Module | None:
    """Load it without a trace in the random generators; None where the policy is the reference, since it still has its weights of
    the `start`: a trainer of the user's own, or whoever calls its `step`, may have changed them."""
    if start is not None and all(gather_object([_traces(current) == start])):
        return None
    before = random_state()
    try:
        return _load(prepared, current)
    finally:
        restore_random_state(before)


def _traces(current: Run) -> list[tuple[int, float]]:
    """Of each parameter, or this rank's shard of it, how often it was written and its sum: no copy, and the host waits once."""
    current.strategy.reshard(current.module)
    parts = [local_part(parameter).detach() for parameter in current.module.parameters()]
    sums = torch.stack([part.sum(dtype=torch.float32) for part in parts]).tolist()
    return list(zip((part._version for part in parts), sums, strict=True))


def _facts(prepared: PreparedRun, version: int) -> Mapping[str, Any]:
    """All that the reference's log-probs of given tokens depend on; on rank 0, which has hashed the inputs."""
    config, loader, strategy = prepared.config, prepared.structure.loader, prepared.strategy
    assert prepared.content is not None
    hashes, named = prepared.content.hashes, prepared.structure.reference is not None
    name, lora = "reference" if named else "model", config.peft.name == "lora" and not named
    dtype = loader.dtype if lora else loader.reference_dtype
    settings = {key: value for key, value in asdict(config.peft).items() if key not in ("init_from", "lora_dropout")}
    packages = versions()["packages"]
    return {
        "weights": hashes[f"{name}.weights"],
        "config": hashes[f"{name}.config.json"],
        "adapter": [hashes["peft.init_from"], settings] if models.reference_is_adapter(config) else None,
        "quantize": config.model.quantize if lora else None,
        "vocabulary": [len(loader.tokenizer), list(loader.new_tokens(prepared.structure.reference or loader.base))],
        "dtype": str(dtype),
        "precision": loader.machine.mixed_precision,
        "attention": loader.attention(dtype),
        "temperature": config.train.temperature,
        **({"compile": True} if config.train.compile else {}),
        **({"likeliest": prepared.loss.candidates} if prepared.loss.candidates else {}),
        "device": loader.machine.device.type,
        "sharded": strategy.name if strategy.is_sharded else None,
        "arithmetic": version,
        "code": source_hash((*verdict.CODE, *CODE)),
        "packages": {package: packages[package] for package in ("torch", "transformers", "peft")},
    }
