"""The one owner of a run's checkpoints and FINAL: snapshot, write (at once or in a background thread), commit."""

import json
import logging
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from accelerate.utils import gather_object
from peft import PeftModel

from halos.checkpoint import commit, final, provenance, select, state, weights
from halos.checkpoint.commit import DiskFullError, Gather, staged
from halos.checkpoint.pruner import Pruner
from halos.checkpoint.saving import Copier, PendingSave
from halos.config import arithmetic_version
from halos.data import dates
from halos.hooks.base import Run, Stop
from halos.hooks.checkpoint import CheckpointHook
from halos.metrics_file import finite

log = logging.getLogger(__name__)

Write = Callable[[], None]


class Checkpointer:
    """Every rank calls every method. `policy` decides when a checkpoint is due and which ones are kept.

    A save takes a `_snapshot` between two steps, writes it here or in a thread with the files that hooks add, commits it, and
    calls the hooks again.
    """

    def __init__(self, run: Run, policy: CheckpointHook) -> None:
        self.run, self.policy = run, policy
        self.saved = run.step  # the step of the newest checkpoint, or the one that the run started from
        self.seconds = 0.0  # that the loop has spent on saves
        self._pending: PendingSave | None = None  # the one save that is in progress
        self._copier = Copier() if policy.async_save else None
        self._pruner = Pruner(run, policy)
        self._lineage: dict[str, Any] = {}
        self._disk_full_stop: Stop | None = None  # the stop that a full disk caused

    def start(self) -> None:
        """Call before the first step. Raises UserError where an adapter was trained on another base."""
        if self.run.main:
            self._lineage = provenance.begin(self.run)
            self._pruner.start()

    def due(self) -> bool:
        return self.policy.due(self.run)

    @property
    def written(self) -> bool | None:
        """Whether this rank has written its part of the save that is in progress; None where none is."""
        return self._pending.done if self._pending is not None else None

    def note_good(self) -> None:
        """Call after each step: a finite gradient may prove a checkpoint good, and older ones may then be deleted."""
        self._pruner.note_good()

    def save(self, *, final: bool) -> None:
        """Save a checkpoint, or with `final` the final model. It becomes visible at once and complete, or not at all.

        With checkpoint.async_save a checkpoint is only copied here; a thread writes it during the next steps (see `finish_save`).
        """
        self.finish_save()
        run, began = self.run, time.perf_counter()
        in_background = self.policy.async_save and not final
        gather = self._gather(in_background=in_background)
        target = run.directory.final if final else run.directory.checkpoints / select.name_of(run.step)
        facts = {
            "step": run.step,
            "world_size": run.accelerator.num_processes,
            arithmetic_version.KEY: arithmetic_version.VERSION,
        }
        self._pending = PendingSave(target, run.step, final=final)
        parts = [self._final if final else self._checkpoint]
        parts += [partial(hook.on_save, run, final=final) for hook in run.hooks.values()]
        self._pending.prepare(staged(target, main=run.main, gather=gather, facts=facts), parts, gather)
        self._pending.finish(in_background=in_background)
        self.seconds += time.perf_counter() - began
        if not in_background:
            self.finish_save()
        if not final:
            run.sync_stop_request()

    def finish_save(self) -> None:
        """Wait for the save in progress, if there is one, and call the hooks. Raises its error."""
        run, pending, began = self.run, self._pending, time.perf_counter()
        if pending is None:
            return
        self._pending = None
        try:
            pending.wait()
        except DiskFullError as error:
            self._disk_full(error, step=pending.step, final=pending.final)
        else:
            if run.main and not pending.final:
                select.record_commit(run.directory, pending.target)
                self._pruner.saved(pending.step)
            run.call_hooks(lambda hook: hook.on_saved(run, pending.target, final=pending.final))
            self.saved = self.saved if pending.final else pending.step
        self.seconds += time.perf_counter() - began

    def finish(self) -> None:
        """Make the last saves after the loop: a checkpoint if one is due or the run stopped early, FINAL if it did not."""
        run = self.run
        if (run.stopped_early or self.due()) and self.saved != run.step:
            self.save(final=False)
            self.finish_save()
        if not run.stopped_early:
            self.save(final=True)

    def end(self) -> None:
        """Call once, however the run ended."""
        self._pruner.end()

    # --- what a save holds -----------------------------------------------------------------------------------------------

    def _checkpoint(self, path: Path) -> Write:
        """Gather or copy now what later steps change, and return the function that writes it."""
        run, deferred, metrics = self.run, commit.DeferredError(), self._metrics()
        self._pruner.wait()
        with deferred:
            if run.main:
                (path / "state").mkdir()
        run.accelerator.wait_for_everyone()
        write, run_then = self._snapshot(path), copy(run)
        deferred.release()

        def rest() -> None:
            write()
            self._write_records(run_then, path, metrics, final=False)

        return rest

    def _snapshot(self, path: Path) -> Write:
        """Take weights and state as they are now. The function returned writes them, whatever the steps do meanwhile."""
        run, strategy, rank = self.run, self.run.strategy, self.run.accelerator.process_index
        optimizer = strategy.optimizer_state(run.module, run.optimizer)
        mutable = {} if strategy.optimizer_state_is_copied else {"optimizer": optimizer}
        adapter = isinstance(run.model, PeftModel)
        sharded = strategy.is_sharded and not adapter
        if sharded:
            values = strategy.shards(run.module)
            mutable |= {} if strategy.shards_are_copied else {"weights": values}
        else:
            values = strategy.gathered(run.module, trained_only=adapter, offload=strategy.is_sharded)
            mutable |= (
                {"weights": values} if run.main and not strategy.is_sharded else {}
            )  # gathered from shards, they are a copy
        moving = run.moving_reference if run.moving_reference is not None and run.moving_reference.has_moved else None
        reference = dict(moving.tensors()) if moving is not None else {}
        mutable |= {"reference": reference} if moving is not None and not moving.tensors_are_copied else {}
        if self._copier:
            mutable = self._copier.copy(mutable)
        random_state, progress = state.random_state(), json.dumps(state.progress_of(run), indent=1)

        def write() -> None:
            deferred, directory = commit.DeferredError(), path / "state"
            with deferred:
                state.save_optimizer(directory, mutable.get("optimizer", optimizer), run.writers)
            with deferred:
                if moving is not None:
                    state.save_reference(directory, mutable.get("reference", reference), run.writers)
            with deferred:
                if sharded:
                    weights.save_shards(path, run.model, mutable.get("weights", values), run.writers, main=run.main)
            with deferred:
                state.save_random(directory, random_state, rank)
                if run.main and not sharded:
                    weights.save_weights(path, run.model, mutable.get("weights", values), run.vocabulary)
                if run.main:
                    dates.save_undated(run.tokenizer, path / "tokenizer")
                    (directory / "progress.json").write_text(progress)
            deferred.release()

        return write

    def _final(self, path: Path) -> None:
        metrics = self._metrics()
        self._pruner.wait()
        final.write(self.run, self.policy, path, self._lineage)
        self._write_records(self.run, path, metrics, final=True)

    def _metrics(self) -> dict[str, Any]:
        run = self.run
        waits = run.stopped_early and run.last_eval.get("step") != run.step  # it is evaluated, if it is due, by the next start
        return {"step": run.step, "train": run.last_train, "eval": {} if waits else run.last_eval}

    def _write_records(self, run: Run, path: Path, metrics: dict[str, Any], *, final: bool) -> None:
        if run.main:
            (path / "metrics.json").write_text(json.dumps(finite(metrics), indent=1))
            provenance.write(self._lineage or provenance.begin(run), run, path, final=final)

    # --- how it is written -----------------------------------------------------------------------------------------------

    def _gather(self, *, in_background: bool) -> Gather:
        """Return the collective of a save. In the background it has a process group of its own: the steps use the default one."""
        if not in_background or not dist.is_initialized():
            return gather_object
        group = self.run.writers = self.run.writers or cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
        everyone: list[Any] = [None] * self.run.accelerator.num_processes

        def gather(own: list[Any]) -> list[Any]:
            dist.all_gather_object(everyone, own, group=group)
            return [one for part in everyone for one in part]

        return gather

    def _disk_full(self, error: DiskFullError, *, step: int, final: bool) -> None:
        """A save found the disk full: every rank goes on or stops, as `on_full_disk` says. The last save must succeed."""
        run = self.run
        newest = max((select.step_of(path) for path in select.checkpoints(run.directory.checkpoints)), default=None)
        previous = "there is no earlier checkpoint" if newest is None else f"the newest checkpoint is of step {newest}"
        what = "FINAL" if final else f"the checkpoint of step {step}"
        message = f"THE DISK IS FULL: {what} was not saved, and {previous} ({error})"
        if self.policy.on_full_disk == "stop" and not run.stopped_early and not final and run.step < run.total_steps:
            self._disk_full_stop = run.stop = Stop(message, finished=False)
        elif final or (run.stopped_early and run.stop is not self._disk_full_stop):
            run.failure = message
        log.warning("%s", message)
