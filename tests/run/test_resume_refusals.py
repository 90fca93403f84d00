"""A resume that cannot work is refused before anything is changed, by a dry run too."""

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


@pytest.mark.parametrize("resume_with", [begin, resume.report_checkpoint])
def test_a_run_that_cannot_be_written_or_is_past_its_last_step_is_not_resumed(
    resume_with: Callable[..., object], saved_twice: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(resume=str(saved_twice.path))
    with pytest.raises(UserError, match="is at step 4, and would end at 3: set more"):
        resume_with(config, saved_twice, 3)
    before = touched(saved_twice)

    def read_only(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match="is not writable, and a resumed run saves there: Read-only"):
        resume_with(config, saved_twice, 9)
    assert touched(saved_twice) == before
