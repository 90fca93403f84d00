"""The checkpoint policy: when a run is saved and which checkpoints are kept. `halos.checkpoint.checkpointer` carries it out."""

from typing import Annotated, Literal

from halos.errors import UserError
from halos.hooks.base import Hook, Run
from halos.hooks.retention import Retention
from halos.types import Range


class CheckpointHook(Hook):
    """One per run: the class that `checkpoint._target_` names. After a step the loop asks `due` whether to save. A run that stops
    early is saved in any case, unless its weights are broken; one that finishes leaves FINAL.

    A subclass of your own overrides `due` or any other method; the files that its `on_save` writes are part of each checkpoint.
    """

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
                f"checkpoint.keep_every={keep_every} is no multiple of checkpoint.every={every}: nothing is saved at those steps"
            )
        self.every, self.keep_last, self.keep_best = every, keep_last, keep_best
        self.keep_every, self.pinned, self.on_full_disk = keep_every, frozenset(pinned), on_full_disk
        self.async_save, self.merge_lora, self.merge_dtype = async_save, merge_lora, merge_dtype
        self.at_end = at_end

    def due(self, run: Run) -> bool:
        """Whether to save a checkpoint of `run.step`."""
        return self.due_at(run.step) or (self.at_end and run.step == run.total_steps)

    def due_at(self, step: int) -> bool:
        """Whether a future step will be saved, for the estimate of the disk space that a run will take."""
        return step in self.pinned or (self.every is not None and step % self.every == 0)

    def retention(self, *, largest: bool) -> Retention:
        """Which checkpoints may be deleted; `largest`: objective.mode is max."""
        return Retention(self.keep_last, self.keep_best, self.keep_every, self.pinned, largest)
