"""The garbage collector ignores what was imported; a resumed run that is finished says how to continue it."""

import gc
import logging
from collections.abc import Callable

import pytest

from halos.checkpoint import manifest
from halos.collection import collect_rarely, freeze_imports
from halos.config.schema import Config
from halos.run.lifecycle import _nothing_to_do, run
from halos.rundir import RunDir


def test_imports_are_frozen_once_and_later_runs_freeze_no_garbage(
    configure: Callable[..., Config],
) -> None:
    gc.unfreeze()
    freeze_imports.cache_clear()  # an earlier test may have called it
    usual = gc.get_threshold()
    collect_rarely()
    assert gc.get_threshold() != usual
    assert run(configure("loss=sft", "dry_run=true"), []) == 0
    frozen = gc.get_freeze_count()
    assert frozen > 100_000
    assert gc.get_threshold() == usual, "training collects as usual"
    assert run(configure("loss=sft", "dry_run=true"), []) == 0
    assert gc.get_freeze_count() <= frozen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["schedule=constant", "schedule.warmup=0"], "to continue: "),
        (["schedule=constant", "schedule.warmup=1"], "to continue: "),
        (["schedule=constant", "schedule.warmup=0.4"], "since its warm-up is a fraction of all steps (schedule.warmup=0.4): "),
        (["schedule=wsd", "schedule.warmup=0", "train.steps=5", "schedule.decay=1"], "to continue: "),
        (["schedule=cosine"], "since the cosine schedule is spread over all steps: continue in a new run with "),
    ],
)
def test_a_finished_run_can_be_continued_where_a_longer_one_would_have_begun_alike(
    words: list[str], said: str, saved_twice: RunDir, configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    saved_twice.write_result("finished", 4, {})
    saved_twice.final.mkdir()
    (saved_twice.final / manifest.NAME).write_text(manifest.describe(saved_twice.final, {}))
    config = configure("loss=sft", "train.steps=4", *words, f"run_dir={saved_twice.path}")
    with caplog.at_level(logging.INFO):
        assert _nothing_to_do(config, saved_twice, [])
    last = caplog.messages[-1]
    assert said in last
    assert f"{saved_twice.path} train.steps=MORE" in last
    assert ("resume_changes=allow" in last) == (said != "to continue: ")
