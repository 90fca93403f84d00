"""FINAL, which from_pretrained loads: after LoRA the merged weights, proved against the trained model, and the adapter."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from halos.checkpoint import lineage, state, weights
from halos.data import dates
from halos.errors import UserError
from halos.hooks.base import Run
from halos.hooks.checkpoint import CheckpointHook
from halos.logps.model import bare
from halos.merge.merge_and_prove import case_of, merge_and_prove
from halos.merge.probe import ProbeOutputs, probe_ids, probe_trained

log = logging.getLogger(__name__)


def write(run: Run, policy: CheckpointHook, path: Path, chain: Mapping[str, Any]) -> None:
    """Write the final model into `path`; every rank calls. A merge that fails keeps the adapter and sets the run's `failure`.
    `chain`, on rank 0: the run's lineage, which identifies its base by content."""
    adapted = isinstance(run.model, PeftModel)
    live = _probe_outputs(run) if adapted and policy.merge_lora else None
    values = run.strategy.gathered(run.module, trained_only=adapted)
    if not run.main:
        return
    if adapted:
        weights.save_weights(path, run.model, values, run.vocabulary)
    else:
        weights.save_model(path, bare(run.model), weights.split_value_head(path, values))
    dates.save_undated(run.tokenizer, path)
    if live is not None:
        random_state = state.random_state()  # loading the merged model draws random numbers
        run.failure = _merge(run, policy, path, chain, live)
        state.restore_random_state(random_state)


def merged_dtype(policy: CheckpointHook, model: PreTrainedModel) -> torch.dtype:
    return model.dtype if policy.merge_dtype == "auto" else getattr(torch, policy.merge_dtype)


def _probe_outputs(run: Run) -> ProbeOutputs:
    """Return the trained model's outputs on the probe; every rank calls, since a sharded forward pass needs all."""
    text = bare(run.model).config.get_text_config()
    ids = probe_ids(run.vocabulary, text.vocab_size, longest=getattr(text, "max_position_embeddings", None), reward=run.reward)
    half = run.accelerator.mixed_precision in ("bf16", "fp16")
    assert isinstance(run.model, PeftModel)
    return probe_trained(
        run.module, run.model, ids, autocast=run.accelerator.autocast, half=half, temperature=run.config.train.temperature
    )


def _merge(run: Run, policy: CheckpointHook, path: Path, chain: Mapping[str, Any], live: ProbeOutputs) -> str | None:
    """Merge and prove. Return why that failed, if it did: then the adapter is kept, and no merged weights are."""
    model = bare(run.model)
    try:
        # merge and proof read the base's files again: neither would notice a change in a row that no probe token uses
        lineage.refuse_other_base(chain or None, run.base, "this run")
        case = case_of(run.base, path / "adapter", run.vocabulary, dtype=merged_dtype(policy, model))
        log.info("merging the adapter; the merged model is then compared with the trained one, in float32 on the CPU")
        result = merge_and_prove(case, path, lineage.hashes, model=model, live=live)
    except (UserError, OSError, RuntimeError, AssertionError) as error:
        return f"the adapter could not be merged: {type(error).__name__}: {error}. It is kept in FINAL/adapter"
    if not result.holds:
        return f"the merged model is not the one that was trained: {result}. The adapter is kept in FINAL/adapter"
    log.info("merged; %s", result)
    return None
