"""The garbage collector ignores what was imported."""

import gc
from collections.abc import Callable

from halos.config.schema import Config
from halos.run.lifecycle import _freeze_imports, run


def test_imports_are_frozen_once_and_later_runs_freeze_no_garbage(
    configure: Callable[..., Config],
) -> None:
    gc.unfreeze()
    _freeze_imports.cache_clear()  # an earlier test may have called it
    assert run(configure("loss=sft", "dry_run=true"), []) == 0
    frozen = gc.get_freeze_count()
    assert frozen > 100_000
    assert run(configure("loss=sft", "dry_run=true"), []) == 0
    assert gc.get_freeze_count() <= frozen
