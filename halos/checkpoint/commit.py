"""Atomic publication of a directory: written under a hidden name, listed in a manifest, synced, then renamed by one rank."""

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
# .NAME.PID: a temporary file of ours that is renamed to NAME; other hidden files may belong to somebody else
TEMPORARY = re.compile(r"\.[\w.-]+\.(?:json|jsonl|yaml|md|html|reserve)\.\d+")
# safetensors and torch.distributed.checkpoint wrap the system's error and keep its words
FULL = re.compile(rf"(?:\[Errno|os error) (?:{'|'.join(map(str, confined.DISK_FULL))})\b")

Gather = Callable[[list[Any]], list[Any]]


class SaveError(Exception):
    """A save that failed on another rank. Nothing of it is visible."""


class DiskFullError(Exception):
    """A save that found the disk full, on this rank or another. Nothing of it is left."""


class DeferredError:
    """Keeps the first error of its `with` blocks, so that this rank still joins the collectives that the others wait in.

    Inside a block, collectives come before whatever can fail on one rank alone, such as writing.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None or isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            return False
        self.error = self.error or error  # torch.distributed.checkpoint's own error is no Exception
        return True

    def release(self) -> None:
        """Raise the error that was kept, if any."""
        if self.error is not None:
            raise self.error


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def gather_alone(own: list[Any]) -> list[Any]:
    """The `gather` of a single process."""
    return own


@contextmanager
def staged(final: Path, *, main: bool, facts: dict[str, Any], gather: Gather = gather_alone) -> Iterator[Path]:
    """Yield a hidden directory to write into; it becomes `final` once every rank is done, never before.

    Every rank enters, and syncs the files that it sees; `gather` gives each rank the lists of all. Rank 0 (`main`) creates the
    directory, writes its manifest and renames it. A directory that exists at `final` is moved aside before, and removed
    afterwards. When a rank fails, the others learn of it instead of waiting, the hidden directory is removed, and every rank
    raises: DiskFullError where a full disk was the only failure, else its own error, or SaveError for another rank's.
    """
    hidden, deferred = final.with_name(HIDDEN + final.name), DeferredError()
    with deferred:
        if main:
            confined.remove(hidden)
            hidden.mkdir(parents=True)
    _raise_together(deferred, hidden, main, gather)
    with deferred:
        yield hidden
    _raise_together(deferred, hidden, main, gather)
    with deferred:
        if main:
            _open_to_readers(hidden)
        for path in manifest.files_of(hidden):  # on every rank: what it wrote may still be in the memory of its own host
            sync(path)
    _raise_together(deferred, hidden, main, gather)
    with deferred:
        if main:
            _publish(hidden, final, facts)
    _raise_together(deferred, hidden, main, gather)


@contextmanager
def exchanged(final: Path) -> Iterator[Path]:
    """Yield a hidden directory that takes the place of `final` for another process to read now. It is neither synced nor hashed,
    which takes longer than the writing: no later start reads it."""
    hidden, replaced = final.with_name(HIDDEN + final.name), final.with_name(REPLACED + final.name)
    confined.remove(hidden)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        _open_to_readers(hidden)
        if os.path.lexists(final):
            confined.remove(replaced)
            final.rename(replaced)
        hidden.rename(final)
    finally:
        for each in (hidden, replaced):
            confined.remove(each)


def _open_to_readers(hidden: Path) -> None:
    """Let whoever may read the directory read its files; safetensors writes them readable by their owner only."""
    mode = hidden.stat().st_mode & 0o666
    for path in manifest.files_of(hidden):
        path.chmod(mode)


def _raise_together(deferred: DeferredError, hidden: Path, main: bool, gather: Gather) -> None:
    """A barrier after which either every rank continues or every rank raises."""
    error = deferred.error
    trace = "".join(traceback.format_exception(error)) if error else ""
    problems = [problem for problem in gather([(str(error), bool(FULL.search(trace))) if error else None]) if problem]
    if not problems:
        return
    if main:
        shutil.rmtree(hidden, ignore_errors=True)
    if all(full for _, full in problems):
        raise DiskFullError(f"no space is left for {hidden}") from error
    deferred.release()
    raise SaveError(f"another rank could not save: {next(text for text, full in problems if not full)}")


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
    for above in list(final.parents)[1:4]:  # the entries of checkpoints/, the run and its sweep, which this save may have created
        with suppress(PermissionError):
            sync(above)
    with suppress(OSError):
        confined.remove(replaced)


def remove_leftovers(directory: Path) -> list[str]:
    """Remove what interrupted saves left in `directory`, and put back the checkpoints that they moved aside. Return the names."""
    if not directory.is_dir():
        return []
    for path in sorted(directory.glob(REPLACED + "*")):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if not final.exists():
            path.rename(final)
    sync(directory)  # replacements must be durable before what they replaced is removed
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
    """Hide checkpoints at once, so that no reader meets half of one, not even after a power cut. The function that is returned
    deletes them."""
    hidden = [path.with_name(HIDDEN + "old-" + path.name) for path in directories]
    for path, new in zip(directories, hidden, strict=True):
        confined.remove(new)
        path.rename(new)
    for parent in {path.parent for path in directories}:
        sync(parent)

    def remove() -> None:
        for path in hidden:
            confined.remove(path)

    return remove
