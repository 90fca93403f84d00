"""One save, in two parts: its copy is taken in turn with the steps, its files may be written beside them."""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Thread, Timer, get_native_id
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from halos.checkpoint.commit import DeferredError, Gather
from halos.distributed.device import uses_gpu

Write = Callable[[], None]
BREATH = 0.05  # seconds before a thread begins to write: at once it would hold the interpreter while the step wants it


class Saving:
    """What is written at `target` for `step`. `begin`, then `finish` here or in a thread; `wait` raises what went wrong."""

    def __init__(self, target: Path, step: int, *, final: bool) -> None:
        self.target, self.step, self.final = target, step, final
        self._stack, self._deferred = ExitStack(), DeferredError()
        self._rest: list[Write] = []
        self._error: BaseException | None = None
        self._thread: Thread | None = None

    def begin(
        self, staged: AbstractContextManager[Path], parts: Iterable[Callable[[Path], Write | None]], gather: Gather
    ) -> None:
        """Enter the protocol and call each part; what a part gives back waits for `finish`, unless another process failed."""
        try:
            path = self._stack.enter_context(staged)
        except Exception as error:
            self._error = error
            return
        for part in parts:
            with self._deferred:
                if rest := part(path):
                    self._rest.append(rest)
        if any(gather([self._deferred.error is not None])):
            self._rest.clear()  # what is left joins processes that may not come

    def finish(self, *, apart: bool) -> None:
        """Write what is left and have it appear; `apart`: in a thread, and this returns at once."""
        if apart and self._error is None:
            self._thread = Timer(BREATH, self._beside)  # no daemon: a process that ends waits for it
            self._thread.start()
        elif self._error is None:
            self._finish()

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Until it stands on the disk. Raises DiskFullError, SaveError, or its own error."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _beside(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own: the steps go first
            os.setpriority(os.PRIO_PROCESS, get_native_id(), 10)
        self._finish()

    def _finish(self) -> None:
        try:
            with self._stack:
                for rest in self._rest:
                    with self._deferred:
                        rest()
                self._deferred.release()
        except BaseException as error:
            self._error = error


class Copier:
    """Copies of tensors in the host's memory, into the same place at every save: nothing grows, nothing is allocated anew.

    Tensors are copied one by one, in about two thirds of the time that torch's stager takes; the stager copies shards.
    """

    def __init__(self) -> None:
        self._cuda = cuda = uses_gpu()
        self._stager = DefaultStager(
            StagingOptions(use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda)
        )
        self._places: dict[tuple[str, str], Tensor] = {}

    def copy(self, state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Groups of tensors, numbers and text by name. Sharded tensors stay sharded, and tied ones tied."""
        copied: dict[str, dict[str, Any]] = {group: {} for group in state}
        others: dict[str, dict[str, Any]] = {group: {} for group in state}
        taken: dict[tuple[Any, ...], Tensor] = {}
        for group, values in state.items():
            for name, value in values.items():
                if type(value) in (Tensor, nn.Parameter):
                    alias = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
                    if alias not in taken:
                        taken[alias] = self._place(group, name, value).copy_(value.detach(), non_blocking=True)
                    copied[group][name] = taken[alias]
                elif isinstance(value, Tensor):
                    others[group][name] = value
                else:
                    copied[group][name] = value  # a setting, which nothing changes in place
        if self._cuda:
            torch.cuda.synchronize()  # what is copied to pinned memory is on its way
        staged = self._stager.stage(others) if any(others.values()) else others
        assert isinstance(staged, dict)
        return {group: {**copied[group], **staged[group]} for group in state}

    def _place(self, group: str, name: str, value: Tensor) -> Tensor:
        place = self._places.get((group, name))
        if place is None or (place.shape, place.dtype) != (value.shape, value.dtype):
            place = torch.empty_like(value, device="cpu", requires_grad=False, pin_memory=self._cuda)
            self._places[group, name] = place
        return place
