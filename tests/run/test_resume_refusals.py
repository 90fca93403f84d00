"""Where a run would go on: what it refuses it refuses before it touches anything, and a dry resume refuses it too."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from halos.errors import UserError
from halos.run import resume

if TYPE_CHECKING:
    from halos.rundir import RunDir


def begin(config: Any, directory: RunDir, total: int) -> object:
    accelerator: Any = SimpleNamespace(is_main_process=True, process_index=0)
    return resume.prepare_directory(config, directory, accelerator, total, None)


def touched(directory: RunDir) -> list[tuple[Path, int]]:
    return [(path, path.stat().st_mtime_ns) for path in sorted(directory.path.rglob("*"))]


@pytest.mark.parametrize("go_on", [begin, resume.report_checkpoint])
def test_a_run_is_not_gone_on_with_where_it_could_not_be_saved_or_is_further_already(
    go_on: Callable[..., object], saved_twice: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(resume=str(saved_twice.path))
    with pytest.raises(UserError, match="is at step 4, and would end at 3: set more"):
        go_on(config, saved_twice, 3)
    before = touched(saved_twice)

    def read_only(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match="is not writable, and a resumed run saves there: Read-only"):
        go_on(config, saved_twice, 9)
    assert touched(saved_twice) == before
