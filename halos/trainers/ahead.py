"""Work for the next micro-batch, done by a thread while the current one computes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from threading import Thread
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from halos.trainers.microbatches import MicroBatch

T = TypeVar("T")


class Later(Generic[T]):
    """A value that is computed when it is first asked for, or before that by a thread, which ends with it: none is left over,
    whatever becomes of the step."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._thread: Thread | None = None
        self._made: list[T] = []  # empty or the value
        self._error: BaseException | None = None

    def start(self) -> None:
        """Compute it in a thread, where nobody does or has."""
        if self._thread is None and not self._made:
            self._thread = Thread(target=self._run, name="halos packing")
            self._thread.start()

    def result(self) -> T:
        """The value. Raises the error that its computation raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        if not self._made:  # also in a process that was forked while the thread ran: it has no such thread
            self._made.append(self._make())
        return self._made[0]

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._made.append(self._make())
        except BaseException as error:
            self._error = error


class NextStep:
    """The micro-batches of the next step, prepared during the current one."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._microbatches: Later[list[MicroBatch]] | None = None

    def start(self, key: Hashable, make: Callable[[], list[MicroBatch]]) -> None:
        """Split the batch that `key` stands for, and pack the first of its micro-batches."""

        def prepare() -> list[MicroBatch]:
            microbatches = make()
            microbatches[0].packed.result()
            return microbatches

        self._key, self._microbatches = key, Later(prepare)
        self._microbatches.start()

    def take(self, key: Hashable) -> list[MicroBatch] | None:
        """The micro-batches of that batch; None where it is not the one that was prepared."""
        if self._microbatches is None or key != self._key:
            return None
        microbatches, self._microbatches = self._microbatches, None
        return microbatches.result()

    def close(self) -> None:
        """Wait for the thread, whose work nobody wants any more."""
        if self._microbatches is not None:
            self._microbatches.wait()
            self._microbatches = None


def in_turn(microbatches: Sequence[MicroBatch], *, ahead: bool) -> Iterator[MicroBatch]:
    """The micro-batches; with `ahead` a thread packs the next one meanwhile."""
    for number, microbatch in enumerate(microbatches, 1):
        if ahead and number < len(microbatches):
            microbatches[number].packed.start()
        yield microbatch
