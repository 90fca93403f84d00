"""A save in two phases: tensors are copied between two steps, files may be written in a background thread."""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Thread, Timer, get_native_id
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from halos.checkpoint.commit import DeferredError, Gather
from halos.distributed.device import uses_gpu

Write = Callable[[], None]
START_DELAY = 0.05  # seconds until a thread starts to write: at once, it would hold the interpreter while the step needs it


class PendingSave:
    """A save of `step` to `target` that is not committed yet: `prepare`, then `finish` here or in a thread, then `wait`."""

    def __init__(self, target: Path, step: int, *, final: bool) -> None:
        self.target, self.step, self.final = target, step, final
        self._stack, self._deferred = ExitStack(), DeferredError()
        self._writes: list[Write] = []
        self._error: BaseException | None = None
        self._thread: Thread | None = None

    def prepare(
        self, staged: AbstractContextManager[Path], parts: Iterable[Callable[[Path], Write | None]], gather: Gather
    ) -> None:
        """Enter `staged` and call each part. `finish` runs the functions that parts return, unless a rank failed here."""
        try:
            path = self._stack.enter_context(staged)
        except Exception as error:
            self._error = error
            return
        for part in parts:
            with self._deferred:
                if write := part(path):
                    self._writes.append(write)
        if any(gather([self._deferred.error is not None])):
            self._writes.clear()  # their collectives would wait for ranks that may not come

    def finish(self, *, in_background: bool) -> None:
        """Write and commit. `in_background`: in a thread, and return at once."""
        if in_background and self._error is None:
            self._thread = Timer(START_DELAY, self._run_in_background)  # no daemon: a process that ends waits for it
            self._thread.start()
        elif self._error is None:
            self._finish()

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the save is durable. Raises DiskFullError, SaveError, or its own error."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run_in_background(self) -> None:
        if sys.platform == "linux":  # where threads have priorities: training steps go first
            os.setpriority(os.PRIO_PROCESS, get_native_id(), 10)
        self._finish()

    def _finish(self) -> None:
        try:
            with self._stack:
                for write in self._writes:
                    with self._deferred:
                        write()
                self._deferred.release()
        except BaseException as error:
            self._error = error


class Copier:
    """Copies tensors to host memory, into the same buffers at every save: memory does not grow, nothing is allocated anew.

    Shards (DTensor) and other wrappers around tensors are copied tensor by tensor and wrapped again: torch's own DefaultStager
    takes half as long again, and in torch 2.11 fails at its second save.
    """

    def __init__(self) -> None:
        self._cuda = uses_gpu()
        self._buffers: dict[tuple[str, ...], Tensor] = {}

    def copy(self, state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Groups of tensors, numbers and text by name. Sharded tensors stay sharded, and tied ones tied."""
        taken: dict[tuple[Any, ...], Tensor] = {}
        copied = {
            group: {
                name: self._copied((group, name), value.detach(), taken) if isinstance(value, Tensor) else value  # a setting
                for name, value in values.items()
            }
            for group, values in state.items()
        }
        if self._cuda:
            torch.cuda.synchronize()  # copies to pinned memory are on their way
        return copied

    def _copied(self, key: tuple[str, ...], value: Tensor, taken: dict[tuple[Any, ...], Tensor]) -> Tensor:
        if is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            parts = {name: getattr(value, name) for name in names}
            inner = {
                name: self._copied((*key, name), part, taken) if isinstance(part, Tensor) else part
                for name, part in parts.items()
            }
            wrapper: Any = type(value)
            return wrapper.__tensor_unflatten__(inner, context, value.shape, value.stride())
        alias = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if alias not in taken:
            taken[alias] = self._buffer(key, value).copy_(value, non_blocking=True)
        return taken[alias]

    def _buffer(self, key: tuple[str, ...], value: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = torch.empty_like(value, device="cpu", requires_grad=False, pin_memory=self._cuda)
            self._buffers[key] = buffer
        return buffer
