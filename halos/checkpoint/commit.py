"""How a directory comes into being at once and complete: hidden, synced, listed in a manifest, renamed by one process."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halos.checkpoint import manifest

HIDDEN = ".partial-"
REPLACED = ".replaced-"


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged(final: Path, *, main: bool, barrier: Callable[[], None], facts: dict[str, Any]) -> Iterator[Path]:
    """Give a hidden directory to write into; when every process is done, it becomes `final`, never before.

    Every process enters. One of them, `main`, makes, lists, syncs and renames it, between two barriers. A directory that
    stands at `final` is replaced by the rename, not written into. When the body raises, nothing becomes visible.
    """
    hidden = final.with_name(HIDDEN + final.name)
    if main:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
    barrier()
    yield hidden
    barrier()
    if main:
        _publish(hidden, final, facts)
    barrier()


def _publish(hidden: Path, final: Path, facts: dict[str, Any]) -> None:
    (hidden / manifest.NAME).write_text(manifest.describe(hidden, facts))
    for path in sorted(hidden.rglob("*"), reverse=True):
        sync(path)
    sync(hidden)
    replaced = final.with_name(REPLACED + final.name)
    if final.exists():
        final.rename(replaced)
    hidden.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sweep(directory: Path) -> list[str]:
    """Remove what saves that died have left in `directory`; a checkpoint that was moved aside for one comes back."""
    removed = []
    for path in sorted(directory.glob(REPLACED + "*")):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path)
            removed.append(path.name)
    for path in sorted(directory.glob(HIDDEN + "*")):
        shutil.rmtree(path)
        removed.append(path.name)
    return removed


def discard(directory: Path) -> None:
    """Delete a checkpoint so that no reader meets half of it: hidden first, then removed."""
    hidden = directory.with_name(HIDDEN + "old-" + directory.name)
    directory.rename(hidden)
    shutil.rmtree(hidden)
