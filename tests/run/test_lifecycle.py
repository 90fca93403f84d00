"""What a start does to its process."""

import gc
from collections.abc import Callable

from halos.config.schema import Config
from halos.run.lifecycle import run


def test_full_collections_skip_what_was_imported_and_no_run_keeps_the_garbage_of_an_earlier_one(
    configure: Callable[..., Config],
) -> None:
    gc.unfreeze()
    assert run(configure("loss=sft", "dry_run=true"), []) == 0
    frozen = gc.get_freeze_count()
    assert frozen > 100_000
    assert run(configure("loss=sft", "dry_run=true"), []) == 0
    assert gc.get_freeze_count() <= frozen
