"""When a run is saved, and what a save holds. How it becomes durable is the commit protocol's matter."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from halos.checkpoint import commit, find, good, lineage, manifest, space, state, weights
from halos.checkpoint.retention import Policy
from halos.checkpoint.saving import Copier
from halos.errors import UserError, doing
from halos.hooks import origin
from halos.hooks.base import Blueprint, Hook, Metrics, Run, Stop
from halos.logps.model import bare
from halos.merge.merge_and_prove import case_of, combine
from halos.merge.rehearsal import rehearse
from halos.merge.trained import Trained, ask, probe
from halos.metrics_file import finite
from halos.rundir import FULL, existing
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
        keep_every: Annotated[int | None, Range(least=1)],
        pinned: Annotated[list[int], Range(least=1)],
        on_full_disk: Literal["warn", "stop"],
        async_save: bool,
        merge_lora: bool,
        merge_dtype: Literal["auto", "float32", "bfloat16", "float16"],
        at_end: bool,
    ) -> None:
        if keep_every is not None and (every is None or keep_every % every):
            raise UserError(
                f"checkpoint.keep_every={keep_every} is no multiple of checkpoint.every={every}: nothing is saved then"
            )
        self.every, self.keep_last, self.keep_best = every, keep_last, keep_best
        self.keep_every, self.pinned, self.on_full_disk = keep_every, frozenset(pinned), on_full_disk
        self.async_save, self.merge_lora, self.merge_dtype = async_save, merge_lora, merge_dtype
        self.at_end = at_end
        self._copier = Copier() if async_save else None
        self._whole: set[int] = set()  # steps whose checkpoints this attempt has verified or written; on the first process
        self._good_until = -1  # the step up to which checkpoints are known to be good, as it stands on the disk; there too
        self._full: Stop | None = None
        self._told = False  # that the note could not be written
        self._removal: Thread | None = None  # deletes older checkpoints beside the steps
        self.origin: dict[str, Any] = {}

    def due(self, run: Run) -> bool:
        return self._due_at(run.step) or (self.at_end and run.step == run.total_steps)

    def check(self, blueprint: Blueprint) -> None:
        """Refuse what could not be merged in the end, and too small a disk."""
        if isinstance(blueprint.model, PeftModel) and self.merge_lora and blueprint.main:
            kind = self._kind(bare(blueprint.model))
            case = case_of(blueprint.base, Path("adapter"), blueprint.vocabulary, dtype=kind, reward=blueprint.reward)
            rehearse(case, blueprint.model)
        problem = self._too_little_space(blueprint) if blueprint.main else None
        if problem:
            raise UserError(problem)

    def on_start(self, run: Run) -> None:
        """Refuse an adapter that met another base than its own."""
        if run.main:
            self.origin = origin.begin(run)
            self._whole = set(self._verified(run))
            self._good_until = min(good.read(run.directory).until, run.step)
            self._note(run, good.Good(self._good_until))

    def on_save(self, run: Run, path: Path, *, final: bool) -> Callable[[], None] | None:
        """FINAL at once; of a checkpoint what the steps change is gathered, or copied, and what writes it is given back."""
        self._await_removal()
        metrics = {"step": run.step, "train": run.last_train, "eval": run.last_eval}
        if final:
            self._final(run, path)
            self._leave(run, path, metrics, final=True)
            return None
        held = commit.Held()
        with held:
            if run.main:
                (path / "state").mkdir()
        run.accelerator.wait_for_everyone()
        write, then = self._parts(run, path), copy(run)
        held.release()

        def rest() -> None:
            write()
            self._leave(then, path, metrics, final=False)

        return rest

    def on_saved(self, run: Run, checkpoint: Path, *, final: bool) -> None:
        if final or not run.main:
            return
        self._whole.add(find.step_of(checkpoint))
        if not self._now_good(run):
            self._delete_expendable(run)

    def on_step(self, run: Run, metrics: Metrics) -> None:
        self._now_good(run)

    def _now_good(self, run: Run) -> bool:
        """Whether a checkpoint is known to be good now that was not: it is recorded, outside of what is sealed, and what was
        kept until then may go."""
        known = [step for step in self._whole if self._good_until < step <= run.finite_at]
        if not run.main or not known:
            return False
        if not self._note(run, good.Good(max(known))):
            return False  # and what was kept stays
        self._good_until = max(known)
        self._delete_expendable(run)
        return True

    def _note(self, run: Run, known: good.Good) -> bool:
        """Whether it stands on the disk. One that is full costs the note, until a later step finds room."""
        try:
            good.write(run.directory, known)
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self._told:
                log.warning("which checkpoints are good cannot be noted (%s): the last one that was is kept until it can", error)
            self._told = True
            return False
        self._told = False
        return True

    def _delete_expendable(self, run: Run) -> None:
        self._await_removal()
        paths = {find.step_of(path): path for path in find.checkpoints(run.directory.checkpoints)}
        # one that was damaged or taken away since it was verified must not stand for one that is there
        whole = [step for step in self._whole & paths.keys() if not manifest.verify(paths[step], contents=False)]
        scores = {step: find.score_of(paths[step], run.config.objective.metric) for step in whole}
        with _best_effort():
            remove = commit.discard([paths[step] for step in self._policy(run).expendable(scores, self._good_until)])
            if self.async_save:
                self._removal = Thread(target=_best_effort()(remove), name="retention")
                self._removal.start()
            else:
                remove()

    def on_end(self, run: Run) -> None:
        self._await_removal()
        if run.main and run.stop is not None and run.stop.failed:
            self._note(run, good.Good(self._good_until, doubted_at=run.step))

    def _await_removal(self) -> None:
        """Room that older checkpoints still take is not there for the next save."""
        if self._removal is not None:
            self._removal.join()

    def on_disk_full(self, run: Run, error: commit.DiskFullError, *, step: int, final: bool) -> None:
        """A save found no room, on every process alike: go on, or stop, as `on_full_disk` says; what comes last must be saved."""
        newest = max((find.step_of(path) for path in find.checkpoints(run.directory.checkpoints)), default=None)
        standing = "there is no earlier checkpoint" if newest is None else f"the newest checkpoint is of step {newest}"
        what = "FINAL" if final else f"the checkpoint of step {step}"
        message = f"THE DISK IS FULL: {what} was not saved, and {standing} ({error})"
        stopping = run.stop is not None and not run.stop.finished
        if self.on_full_disk == "stop" and not stopping and not final and run.step < run.total_steps:
            self._full = run.stop = Stop(message, finished=False)
        elif final or (stopping and run.stop is not self._full):
            run.failure = message
        log.warning("%s", message)

    def _due_at(self, step: int) -> bool:
        return step in self.pinned or (self.every is not None and step % self.every == 0)

    def _policy(self, run: Run | Blueprint) -> Policy:
        largest = run.config.objective.mode == "max"
        return Policy(self.keep_last, self.keep_best, self.keep_every, self.pinned, largest)

    def _verified(self, run: Run) -> Iterator[int]:
        """Steps of the checkpoints that are whole, each read once; the one that the run goes on from was, just before."""
        for path in find.checkpoints(run.directory.checkpoints):
            step = find.step_of(path)
            faults = [] if step == run.step else manifest.verify(path)
            if faults:
                log.warning("%s is not whole (%s): it is left as it is, and counts as none of those kept", path, faults[0])
            else:
                yield step

    def _too_little_space(self, blueprint: Blueprint) -> str | None:
        """What is wrong with the disk for the checkpoints to come and FINAL, if anything is; says what they will take."""
        model, vocabulary, config = blueprint.model, len(blueprint.tokenizer), blueprint.config
        adapter, directory = isinstance(model, PeftModel), blueprint.directory.checkpoints
        one = space.checkpoint_bytes(model, adapter=adapter, optimizer=config.optim.name, vocabulary=vocabulary)
        final = space.final_bytes(model, adapter_alone=adapter and not self.merge_lora, vocabulary=vocabulary)
        steps = [step for step in range(1, blueprint.total_steps + 1) if self._due_at(step)] or [blueprint.total_steps]
        most, free = self._policy(blueprint).most(steps), shutil.disk_usage(existing(directory)).free
        there = sum(not manifest.verify(path, contents=False) for path in find.checkpoints(directory))
        sizes = [manifest.in_words(size) for size in (one, final, free)]
        said = f"at most {most} checkpoint{'s' * (most != 1)} of about {sizes[0]}, FINAL of about {sizes[1]}; {sizes[2]} free"
        blueprint.lines.append(("disk", said))
        return space.too_little(directory, free=free, one=one, most=most, there=there, final=final)

    def _parts(self, run: Run, path: Path) -> Callable[[], None]:
        """A checkpoint's weights and state as they are now; what is given back writes them, whatever the steps do meanwhile."""
        sharded, adapter, rank = run.strategy.is_sharded, isinstance(run.model, PeftModel), run.accelerator.process_index
        optimizer = run.strategy.optimizer_state(run.module, run.optimizer)
        moving = {} if run.strategy.optimizer_state_is_copied else {"optimizer": optimizer}
        whole = run.strategy.gathered(run.module, trained_only=adapter, offload=sharded)
        moving |= {"weights": whole} if run.main and not sharded else {}  # what was gathered from shards is a copy
        if self._copier:
            moving = self._copier.copy(moving)
        drawn, progress = state.random_state(), json.dumps(progress_of(run), indent=1)

        def write() -> None:
            held, directory = commit.Held(), path / "state"
            with held:
                state.save_optimizer(directory, moving.get("optimizer", optimizer), run.writers)
            with held:
                state.save_random(directory, drawn, rank)
                if run.main:
                    weights.save_weights(path, run.model, moving.get("weights", whole), run.vocabulary)
                    run.tokenizer.save_pretrained(path / "tokenizer")
                    (directory / "progress.json").write_text(progress)
            held.release()

        return write

    def _leave(self, run: Run, path: Path, metrics: dict[str, Any], *, final: bool) -> None:
        if run.main:
            (path / "metrics.json").write_text(json.dumps(finite(metrics), indent=1))
            origin.leave(self.origin or origin.begin(run), run, path, final=final)

    def _final(self, run: Run, path: Path) -> None:
        """What from_pretrained loads: merged weights (and adapter/) for LoRA, else the model itself."""
        live = self._ask(run) if isinstance(run.model, PeftModel) and self.merge_lora else None
        if isinstance(run.model, PeftModel):
            values = run.strategy.gathered(run.module, trained_only=True)
            if run.main:
                weights.save_weights(path, run.model, values, run.vocabulary)
        else:
            values = run.strategy.gathered(run.module, trained_only=False)
            if run.main:
                weights.save_model(path, bare(run.model), weights.apart(path, values))
        if run.main:
            run.tokenizer.save_pretrained(path)
            if live is not None:
                drawn = state.random_state()  # loading the merged model draws random numbers
                run.failure = self._merge(run, path / "adapter", path, live)
                state.restore_random_state(drawn)

    def _kind(self, model: PreTrainedModel) -> torch.dtype:
        """Of merged weights."""
        return model.dtype if self.merge_dtype == "auto" else getattr(torch, self.merge_dtype)

    def _ask(self, run: Run) -> Trained:
        """What the trained model says; a sharded one's forward needs all processes."""
        text = bare(run.model).config.get_text_config()
        ids = probe(run.vocabulary, text.vocab_size, longest=getattr(text, "max_position_embeddings", None), reward=run.reward)
        half = run.accelerator.mixed_precision in ("bf16", "fp16")
        assert isinstance(run.model, PeftModel)
        return ask(
            run.module, run.model, ids, autocast=run.accelerator.autocast, half=half, temperature=run.config.train.temperature
        )

    def _merge(self, run: Run, adapter: Path, path: Path, live: Trained) -> str | None:
        """Merge and prove; why it failed, if it did, in which case the adapter is kept and no merged weights are."""
        model = bare(run.model)
        try:
            # its files are read again: a row that no probe reads would be merged as it is now, by merge and proof alike
            lineage.refuse_other_base(self.origin or None, run.base, "this run")
            case = case_of(run.base, adapter, run.vocabulary, dtype=self._kind(model))
            result = combine(case, path, lineage.hashes, model=model, live=live)
        except (UserError, OSError, RuntimeError, AssertionError) as error:
            return f"the adapter could not be merged: {type(error).__name__}: {error}. It is kept in FINAL/adapter"
        if not result.holds:
            return f"the merged model is not the one that was trained: {result}. The adapter is kept in FINAL/adapter"
        log.info("merged; %s", result)
        return None


@contextmanager
def _best_effort() -> Iterator[None]:
    """What could not be deleted is told, and swept at the next start."""
    try:
        yield
    except OSError as error:
        log.warning("older checkpoints could not be deleted: %s", error)


def progress_of(run: Run) -> dict[str, Any]:
    """The part of a run's state that is not tensors."""
    return {
        "step": run.step,
        "examples": run.examples,
        "tokens": run.tokens,
        "last_eval": run.last_eval,
        "last_train": run.last_train,
        "window": run.window.totals,
        "bad_steps": run.bad_steps,
        "skipped_steps": run.skipped_steps,
        "finite_at": run.finite_at,
        "world_size": run.accelerator.num_processes,
        "hooks": {name: hook.state_dict() for name, hook in run.hooks.items()},
    }


def restore(run: Run, checkpoint: Path) -> dict[str, Any]:
    """Optimizer, random numbers, position and hooks as they were saved; weights were loaded with the model."""
    directory = checkpoint / "state"
    progress = state.load_progress(directory, find.step_of(checkpoint))
    with doing(f"{directory} cannot be put back", f"resume from another checkpoint, resume={checkpoint.parent}/step-N"):
        state.load_optimizer(directory, run.strategy, run.module, run.optimizer)
        state.load_random(directory, run.accelerator.process_index)
        for name, hook in run.hooks.items():
            if name in progress["hooks"]:  # one that was not there then begins now
                hook.load_state_dict(progress["hooks"][name])
    run.step, run.examples, run.tokens = progress["step"], progress["examples"], progress["tokens"]
    run.last_eval, run.last_train = progress["last_eval"], progress["last_train"]
    run.window.totals = progress["window"]
    run.bad_steps, run.skipped_steps = progress.get("bad_steps", 0), progress.get("skipped_steps", 0)
    run.finite_at = progress.get("finite_at", -1)
    return progress
