"""The one owner of a run's saves: a snapshot on the step, written there or beside the next ones, committed whole or not."""

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
from halos.checkpoint.saving import Copier, Saving
from halos.config import arithmetic_version
from halos.hooks.base import Run, Stop
from halos.hooks.checkpoint import CheckpointHook
from halos.metrics_file import finite

log = logging.getLogger(__name__)

Write = Callable[[], None]


class Checkpointer:
    """Every process calls every method. The loop says when; the policy which stay, and what is added; here is how.

    A save is `_snapshot`, on the step, then its writing, here or in a thread, then the commit, after which hooks hear of it.
    """

    def __init__(self, run: Run, policy: CheckpointHook) -> None:
        self.run, self.policy = run, policy
        self.saved = run.step  # the newest step that a checkpoint holds, or the one that needs none
        self.seconds = 0.0  # that the loop has waited for saves
        self._saving: Saving | None = None  # the one save that is under way
        self._copier = Copier() if policy.async_save else None
        self._pruner = Pruner(run, policy)
        self._origin: dict[str, Any] = {}
        self._full: Stop | None = None  # that a full disk has brought about

    def start(self) -> None:
        """Before the first step. Raises UserError where an adapter met another base than its own."""
        if self.run.main:
            self._origin = provenance.begin(self.run)
            self._pruner.start()

    def due(self) -> bool:
        return self.policy.due(self.run)

    @property
    def written(self) -> bool | None:
        """Whether this process has written its part of the save that is under way; None where none is."""
        return self._saving.done if self._saving is not None else None

    def note_good(self) -> None:
        """After a step: its gradient may have shown that a checkpoint is good, and that older ones may go."""
        self._pruner.note_good()

    def save(self, *, final: bool) -> None:
        """A checkpoint, or with `final` what the user came for. It becomes visible at once, complete, or not at all.

        With checkpoint.async_save a checkpoint is copied here and written beside the next steps, until `finish_save`.
        """
        self.finish_save()
        run, began = self.run, time.perf_counter()
        beside = self.policy.async_save and not final
        gather = self._gather(beside=beside)
        target = run.directory.final if final else run.directory.checkpoints / select.name_of(run.step)
        facts = {
            "step": run.step,
            "world_size": run.accelerator.num_processes,
            arithmetic_version.KEY: arithmetic_version.VERSION,
        }
        self._saving = Saving(target, run.step, final=final)
        parts = [self._final if final else self._checkpoint]
        parts += [partial(hook.on_save, run, final=final) for hook in run.hooks.values()]
        self._saving.begin(staged(target, main=run.main, gather=gather, facts=facts), parts, gather)
        self._saving.finish(apart=beside)
        self.seconds += time.perf_counter() - began
        if not beside:
            self.finish_save()
        if not final:
            run.sync_stop_request()

    def finish_save(self) -> None:
        """Wait for the save that is under way, if one is, and tell the hooks. Raises what went wrong."""
        run, saving, began = self.run, self._saving, time.perf_counter()
        if saving is None:
            return
        self._saving = None
        try:
            saving.wait()
        except DiskFullError as error:
            self._disk_full(error, step=saving.step, final=saving.final)
        else:
            if run.main and not saving.final:
                select.record_commit(run.directory, saving.target)
                self._pruner.saved(saving.step)
            run.call_hooks(lambda hook: hook.on_saved(run, saving.target, final=saving.final))
            self.saved = self.saved if saving.final else saving.step
        self.seconds += time.perf_counter() - began

    def finish(self) -> None:
        """The last saves of a loop that has ended: FINAL where it ended in its own time, and a checkpoint where one is wanted."""
        run = self.run
        if (run.stopped_early or self.due()) and self.saved != run.step:
            self.save(final=False)
            self.finish_save()
        if not run.stopped_early:
            self.save(final=True)

    def end(self) -> None:
        """However the run ended."""
        self._pruner.end()

    # --- what a save holds -----------------------------------------------------------------------------------------------

    def _checkpoint(self, path: Path) -> Write:
        """What the steps change is gathered, or copied, now; what writes it is given back."""
        run, deferred, metrics = self.run, commit.DeferredError(), self._metrics()
        self._pruner.wait()
        with deferred:
            if run.main:
                (path / "state").mkdir()
        run.accelerator.wait_for_everyone()
        write, then = self._snapshot(path), copy(run)
        deferred.release()

        def rest() -> None:
            write()
            self._leave(then, path, metrics, final=False)

        return rest

    def _snapshot(self, path: Path) -> Write:
        """Weights and state as they are now; what is given back writes them, whatever the steps do meanwhile."""
        run, strategy, rank = self.run, self.run.strategy, self.run.accelerator.process_index
        optimizer = strategy.optimizer_state(run.module, run.optimizer)
        moving = {} if strategy.optimizer_state_is_copied else {"optimizer": optimizer}
        adapter = isinstance(run.model, PeftModel)
        sharded = strategy.is_sharded and not adapter
        if sharded:
            values = strategy.shards(run.module)
            moving |= {} if strategy.shards_are_copied else {"weights": values}
        else:
            values = strategy.gathered(run.module, trained_only=adapter, offload=strategy.is_sharded)
            moving |= {"weights": values} if run.main and not strategy.is_sharded else {}  # gathered from shards it is a copy
        if self._copier:
            moving = self._copier.copy(moving)
        drawn, progress = state.random_state(), json.dumps(state.progress_of(run), indent=1)

        def write() -> None:
            deferred, directory = commit.DeferredError(), path / "state"
            with deferred:
                state.save_optimizer(directory, moving.get("optimizer", optimizer), run.writers)
            with deferred:
                if sharded:
                    weights.save_shards(path, run.model, moving.get("weights", values), run.writers, main=run.main)
            with deferred:
                state.save_random(directory, drawn, rank)
                if run.main and not sharded:
                    weights.save_weights(path, run.model, moving.get("weights", values), run.vocabulary)
                if run.main:
                    run.tokenizer.save_pretrained(path / "tokenizer")
                    (directory / "progress.json").write_text(progress)
            deferred.release()

        return write

    def _final(self, path: Path) -> None:
        metrics = self._metrics()
        self._pruner.wait()
        final.write(self.run, self.policy, path, self._origin)
        self._leave(self.run, path, metrics, final=True)

    def _metrics(self) -> dict[str, Any]:
        return {"step": self.run.step, "train": self.run.last_train, "eval": self.run.last_eval}

    def _leave(self, run: Run, path: Path, metrics: dict[str, Any], *, final: bool) -> None:
        if run.main:
            (path / "metrics.json").write_text(json.dumps(finite(metrics), indent=1))
            provenance.write(self._origin or provenance.begin(run), run, path, final=final)

    # --- how it is written -----------------------------------------------------------------------------------------------

    def _gather(self, *, beside: bool) -> Gather:
        """How the processes of a save speak; `beside` the steps over a group of their own, since those use the default one."""
        if not beside or not dist.is_initialized():
            return gather_object
        group = self.run.writers = self.run.writers or cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
        everyone: list[Any] = [None] * self.run.accelerator.num_processes

        def gather(own: list[Any]) -> list[Any]:
            dist.all_gather_object(everyone, own, group=group)
            return [one for part in everyone for one in part]

        return gather

    def _disk_full(self, error: DiskFullError, *, step: int, final: bool) -> None:
        """A save has no room, on every process alike: go on, or stop, as `on_full_disk` says; what comes last must be saved."""
        run = self.run
        newest = max((select.step_of(path) for path in select.checkpoints(run.directory.checkpoints)), default=None)
        standing = "there is no earlier checkpoint" if newest is None else f"the newest checkpoint is of step {newest}"
        what = "FINAL" if final else f"the checkpoint of step {step}"
        message = f"THE DISK IS FULL: {what} was not saved, and {standing} ({error})"
        if self.policy.on_full_disk == "stop" and not run.stopped_early and not final and run.step < run.total_steps:
            self._full = run.stop = Stop(message, finished=False)
        elif final or (run.stopped_early and run.stop is not self._full):
            run.failure = message
        log.warning("%s", message)
