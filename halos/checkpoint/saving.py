"""One save, in two parts: its copy is taken in turn with the steps, its files may be written beside them."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from halos.checkpoint.commit import Gather, Held

Write = Callable[[], None]


class Saving:
    """What is written at `target` for `step`. `begin`, then `finish` here or in a thread; `wait` raises what went wrong."""

    def __init__(self, target: Path, step: int, *, final: bool) -> None:
        self.target, self.step, self.final = target, step, final
        self._stack, self._held = ExitStack(), Held()
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
            with self._held:
                if rest := part(path):
                    self._rest.append(rest)
        if any(gather([self._held.error is not None])):
            self._rest.clear()  # what is left joins processes that may not come

    def finish(self, *, apart: bool) -> None:
        """Write what is left and have it appear; `apart`: in a thread, and this returns at once."""
        if apart and self._error is None:
            self._thread = Thread(target=self._finish, name="checkpoint")  # no daemon: a process that ends waits for it
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

    def _finish(self) -> None:
        try:
            with self._stack:
                for rest in self._rest:
                    with self._held:
                        rest()
                self._held.release()
        except BaseException as error:
            self._error = error


class Copier:
    """Copies of tensors in the host's memory, into the same place at every save: nothing grows, nothing is allocated anew."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda)
        )

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """Sharded tensors stay sharded; numbers and text are copied too."""
        copied = self._stager.stage(state)
        assert isinstance(copied, dict)
        return copied
