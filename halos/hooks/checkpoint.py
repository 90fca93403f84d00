"""When a run is saved, and what a save holds. How it becomes durable is the commit protocol's matter."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from halos.checkpoint import commit, find, merge, retention, state, weights
from halos.checkpoint.handover import case_of, combine
from halos.errors import UserError
from halos.hooks import origin
from halos.hooks.base import Hook, Run
from halos.logps.model import bare
from halos.types import Range

log = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """One per run, chosen by `checkpoint=`. The loop asks `due` after every step, and always saves once more at the end."""

    def __init__(
        self,
        *,
        every: Annotated[int | None, Range(least=1)],
        keep_last: Annotated[int, Range(least=1)],
        keep_best: Annotated[int, Range(least=0)],
        merge_lora: bool,
        merge_dtype: Literal["auto", "float32", "bfloat16", "float16"],
    ) -> None:
        self.every, self.keep_last, self.keep_best = every, keep_last, keep_best
        self.merge_lora, self.merge_dtype = merge_lora, merge_dtype
        self.origin: dict[str, Any] = {}

    def on_start(self, run: Run) -> None:
        """Refuse what could not be merged in the end, and an adapter that met another base than its own."""
        if isinstance(run.model, PeftModel) and self.merge_lora:
            merge.check(run.base, run.model)
        if run.main:
            self.origin = origin.begin(run)

    def due(self, run: Run) -> bool:
        return self.every is not None and run.step % self.every == 0

    def on_save(self, run: Run, path: Path, *, final: bool) -> None:
        if final:
            self._final(run, path)
        else:
            weights.save_weights(path, run.module, run.model, main=run.main)
            self._state(run, path / "state")
            if run.main:
                run.tokenizer.save_pretrained(path / "tokenizer")
        if run.main:
            metrics = {"step": run.step, "train": run.last_train, "eval": run.last_eval}
            (path / "metrics.json").write_text(json.dumps(metrics, indent=1))
            origin.leave(self.origin or origin.begin(run), run, path, final=final)

    def on_saved(self, run: Run, checkpoint: Path, *, final: bool) -> None:
        if final or not run.main:
            return
        objective = run.config.objective
        paths = {find.step_of(path): path for path in find.checkpoints(checkpoint.parent)}
        scores = {step: find.metrics_of(path).get("eval", {}).get(objective.metric) for step, path in paths.items()}
        largest = objective.mode == "max"
        for step in retention.expendable(scores, keep_last=self.keep_last, keep_best=self.keep_best, largest=largest):
            commit.discard(paths[step])

    def _state(self, run: Run, path: Path) -> None:
        path.mkdir(exist_ok=True)
        run.accelerator.wait_for_everyone()
        state.save_optimizer(path, run.module, run.optimizer)
        state.save_random(path, run.accelerator.process_index)
        if run.main:
            state.save_progress(path, progress_of(run))

    def _final(self, run: Run, path: Path) -> None:
        """What from_pretrained loads: merged weights (and adapter/) for LoRA, else the model itself."""
        if run.main:
            run.tokenizer.save_pretrained(path)
        if not isinstance(run.model, PeftModel):
            values = weights.gathered(run.module, trained_only=False)
            if run.main:
                weights.save_model(path, bare(run.model), values)
        else:
            adapter = weights.save_weights(path, run.module, run.model, main=run.main)
            if run.main and self.merge_lora:
                run.failure = self._merge(run, adapter, path)

    def _merge(self, run: Run, adapter: Path, path: Path) -> str | None:
        """Merge and prove; why it failed, if it did, in which case the adapter is kept and no merged weights are."""
        model = bare(run.model)
        kind = model.dtype if self.merge_dtype == "auto" else getattr(torch, self.merge_dtype)
        exact = model.dtype is torch.float32 and not getattr(model, "is_quantized", False)
        try:
            case = case_of(run.base, adapter, path, dtype=kind)
            result = combine(case, path, model=model, logits=partial(_logits, run) if exact else None)
        except (UserError, OSError, RuntimeError, AssertionError) as error:
            return f"the adapter could not be merged: {type(error).__name__}: {error}. It is kept in FINAL/adapter"
        if not result.holds:
            return f"the merged model is not the one that was trained: {result}. The adapter is kept in FINAL/adapter"
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(path)
        log.info("merged; %s", result)
        return None


def progress_of(run: Run) -> dict[str, Any]:
    """The part of a run's state that is not tensors."""
    return {
        "step": run.step,
        "examples": run.examples,
        "tokens": run.tokens,
        "last_eval": run.last_eval,
        "last_train": run.last_train,
        "window": run.window.totals,
        "world_size": run.accelerator.num_processes,
        "hooks": {name: hook.state_dict() for name, hook in run.hooks.items()},
    }


def restore(run: Run, checkpoint: Path) -> dict[str, Any]:
    """Optimizer, random numbers, position and hooks as they were saved; weights were loaded with the model."""
    directory = checkpoint / "state"
    state.load_optimizer(directory, run.module, run.optimizer)
    state.load_random(directory, run.accelerator.process_index)
    progress = state.load_progress(directory)
    run.step, run.examples, run.tokens = progress["step"], progress["examples"], progress["tokens"]
    run.last_eval, run.last_train = progress["last_eval"], progress["last_train"]
    run.window.totals = progress["window"]
    for name, hook in run.hooks.items():
        hook.load_state_dict(progress["hooks"].get(name, {}))
    return progress


@torch.no_grad()
def _logits(run: Run, ids: Tensor) -> Tensor:
    """The trained model's own logits for `ids`, by its own forward, whatever attention training used."""
    model = bare(run.model)
    used, training = str(model.config._attn_implementation), model.training
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        return model.eval()(input_ids=ids.to(model.device)).logits.float().cpu()
    finally:
        model.set_attn_implementation(used)
        model.train(training)
