"""The garbage collector ignores what was imported; a resumed run that is finished says how to continue it."""

import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest

import train
from halos.checkpoint import manifest
from halos.collection import collect_rarely, freeze_imports
from halos.config.schema import Config
from halos.hooks.base import Hook, Run
from halos.hooks.log import MetricsLog
from halos.hooks.progress import ProgressBar
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


def test_a_hook_that_fails_at_the_end_is_named_in_the_result_and_the_others_end(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    def fails(hook: Hook, run: Run) -> None:
        ended.append(type(hook))
        raise ValueError("cannot close")

    monkeypatch.setattr(MetricsLog, "on_end", fails)
    monkeypatch.setattr(ProgressBar, "on_end", fails)
    config = configure("loss=sft", "train.steps=1", "train.batch_size=4", "checkpoint.every=null")
    with pytest.raises(ValueError, match="cannot close"):
        run(config, [])
    assert {*ended} == {MetricsLog, ProgressBar}
    result = RunDir(config.run_dir).read_result()
    assert result is not None
    assert result["status"] == "finished", "FINAL is whole"
    assert result["reason"] == "after the last step: ValueError: cannot close"


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


class KilledError(BaseException):
    """Simulates SIGKILL."""


def test_a_longer_run_that_was_killed_when_its_start_was_recorded_takes_the_steps_that_are_left(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["loss=sft", "train.batch_size=4", "schedule=constant", "schedule.warmup=0", "checkpoint.at_end=true"]
    directory = RunDir((config := configure(*words, "train.steps=2")).run_dir)
    assert run(config, []) == 0
    recorded = RunDir.start_attempt

    def killed(*arguments: Any) -> None:
        recorded(*arguments)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "start_attempt", killed)
        with pytest.raises(KilledError):
            train.start([f"resume={directory.path}", "train.steps=4"])
    assert train.start([f"resume={directory.path}", "train.steps=4"]) == 0
    assert (result := directory.read_result())
    assert (result["status"], result["step"]) == ("finished", 4)
