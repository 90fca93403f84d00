"""How a directory comes into being at once and complete: hidden, synced, listed in a manifest, renamed by one process."""

import errno
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from halos import confined
from halos.checkpoint import manifest

HIDDEN = ".partial-"
REPLACED = ".replaced-"
# .NAME.PID: a small file of ours on its way to NAME; whatever else is hidden may be somebody's
TEMPORARY = re.compile(r"\.[\w.-]+\.(?:json|jsonl|yaml|md|html|reserve)\.\d+")
# safetensors and torch.distributed.checkpoint wrap the system's error and keep its words
FULL = re.compile(rf"(?:\[Errno|os error) (?:{errno.ENOSPC}|{errno.EDQUOT})\b")

Gather = Callable[[list[Any]], list[Any]]


class SaveError(Exception):
    """A save that failed in another process. Nothing of it is visible."""


class DiskFullError(Exception):
    """A save that found no room, in this process or another. Nothing of it is left."""


class Held:
    """Keeps the first error of its blocks, so that this process still joins the collectives that the others wait in.

    Inside a block collectives come before whatever can fail in one process alone, as writing does.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None or isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            return False
        self.error = self.error or error  # torch.distributed.checkpoint's own is no Exception
        return True

    def release(self) -> None:
        """Raise what was kept."""
        if self.error is not None:
            raise self.error


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def alone(own: list[Any]) -> list[Any]:
    """What `gather` is where there is one process."""
    return own


@contextmanager
def staged(final: Path, *, main: bool, facts: dict[str, Any], gather: Gather = alone) -> Iterator[Path]:
    """Give a hidden directory to write into; when every process is done, it becomes `final`, never before.

    Every process enters, and `gather` gives each the lists of all. One of them, `main`, makes, lists, syncs and renames the
    directory. One that stands at `final` is replaced by the rename, not written into. When a process fails, all learn of it
    instead of waiting, nothing becomes visible or is left behind, and every process raises: DiskFullError where that is all
    that was wrong, else its own error, or SaveError for another's.
    """
    hidden, held = final.with_name(HIDDEN + final.name), Held()
    with held:
        if main:
            confined.remove(hidden)
            hidden.mkdir(parents=True)
    _settle(held, hidden, main, gather)
    with held:
        yield hidden
    _settle(held, hidden, main, gather)
    with held:
        if main:
            _open_to_readers(hidden)
        for path in manifest.files_of(hidden):  # every process: what it wrote may wait in the memory of its own host
            sync(path)
    _settle(held, hidden, main, gather)
    with held:
        if main:
            _publish(hidden, final, facts)
    _settle(held, hidden, main, gather)


def _open_to_readers(hidden: Path) -> None:
    """Who may read the directory may read its files; safetensors writes them for their owner alone."""
    mode = hidden.stat().st_mode & 0o666
    for path in manifest.files_of(hidden):
        path.chmod(mode)


def _settle(held: Held, hidden: Path, main: bool, gather: Gather) -> None:
    """A barrier, after which every process goes on or every process raises."""
    error = held.error
    words = "".join(traceback.format_exception(error)) if error else ""
    problems = [problem for problem in gather([(str(error), bool(FULL.search(words))) if error else None]) if problem]
    if not problems:
        return
    if main:
        shutil.rmtree(hidden, ignore_errors=True)
    if all(full for _, full in problems):
        raise DiskFullError(f"no space is left for {hidden}") from error
    held.release()
    raise SaveError(f"another process could not save: {next(text for text, full in problems if not full)}")


def _publish(hidden: Path, final: Path, facts: dict[str, Any]) -> None:
    listing = hidden / manifest.NAME
    listing.write_bytes(manifest.describe(hidden, facts).encode())
    sync(listing)
    for path in sorted((path for path in hidden.rglob("*") if path.is_dir()), reverse=True):
        sync(path)
    sync(hidden)
    replaced = final.with_name(REPLACED + final.name)
    if os.path.lexists(final):
        confined.remove(replaced)
        final.rename(replaced)
    try:
        hidden.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync(final.parent)
    for above in list(final.parents)[1:4]:  # checkpoints/, the run's directory and a sweep's: this save may be their first
        with suppress(PermissionError):
            sync(above)
    with suppress(OSError):
        confined.remove(replaced)


def sweep(directory: Path) -> list[str]:
    """Remove what saves that died have left in `directory`; a checkpoint that was moved aside for one comes back."""
    if not directory.is_dir():
        return []
    for path in sorted(directory.glob(REPLACED + "*")):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if not final.exists():
            path.rename(final)
    sync(directory)  # what took the place of the removed must be there to stay
    removed = []
    for path in sorted([*directory.iterdir(), *directory.glob("attempts/*")]):
        if path.name.startswith((HIDDEN, REPLACED)):
            confined.remove(path)
            removed.append(path.name)
        elif TEMPORARY.fullmatch(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()
            removed.append(path.name)
    return removed


def discard(directories: Sequence[Path]) -> Callable[[], None]:
    """Take checkpoints away so that no reader meets half of one, not even after a power cut: hidden now, removed by the call
    that is given back."""
    hidden = [path.with_name(HIDDEN + "old-" + path.name) for path in directories]
    for path, place in zip(directories, hidden, strict=True):
        confined.remove(place)
        path.rename(place)
    for parent in {path.parent for path in directories}:
        sync(parent)

    def remove() -> None:
        for place in hidden:
            confined.remove(place)

    return remove
