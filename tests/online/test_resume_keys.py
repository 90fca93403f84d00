"""Keys that the training inside an online run follows: a resume changes what is trained, or is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import halos.run
import train
from halos.cli.compose import ConfigTree
from halos.cli.online import live_config, overrides_of_rounds
from halos.config import run_config, validate
from halos.errors import UserError
from halos.online import rounds
from halos.rundir import RunDir

LOOPS = pytest.mark.parametrize("loop", [["online.rounds=1"], ["online.steps=1"]], ids=["rounds", "live"])
Begin = Callable[..., list[str]]


@pytest.fixture
def begin(cache: Path, tmp_path: Path) -> Begin:
    def started(*words: str) -> list[str]:
        """The command that resumes a run with any change, whose directory is as its start leaves it."""
        command = ["loss=online", "model=tiny", "data=arithmetic", f"output_root={tmp_path}", "exp_name=x",
                   f"cache_dir={cache}", *words]  # fmt: skip
        tree = ConfigTree()
        config = validate.check(tree.compose(command), command, tree.choices)
        assert config.online is not None
        directory = RunDir(config.run_dir)
        directory.create(overwrite=False)
        if config.online.steps is None:
            stored, warmup = overrides_of_rounds(command, config, tree)
            (directory.path / rounds.OVERRIDES).write_text(json.dumps({"words": stored, rounds.ONE_WARMUP: warmup}))
        else:
            config = live_config(config, command, tree)
        directory.write_config(run_config.dump(config))
        directory.start_attempt({})
        return [f"resume={directory.path}", "resume_changes=allow"]

    return started


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that rounds, or a live loop, would be trained with."""
    found = list[Any]()
    monkeypatch.setattr(rounds, "run", lambda config, training, *_, **__: found.append(training) or 0)
    monkeypatch.setattr(halos.run, "run", lambda config, *_: found.append(config) or 0)
    return found


@LOOPS
@pytest.mark.parametrize("change", ["online.overrides=['loss.beta=0.9']", "online.loss=rloo"])
@pytest.mark.usefixtures("trained")
def test_a_loss_or_overrides_that_the_training_would_not_have_are_refused(change: str, loop: list[str], begin: Begin) -> None:
    resume = begin("online.loss=grpo", "online.overrides=['loss.beta=0.3']", *loop)
    with pytest.raises(UserError, match=rf"{change.partition('=')[0]} .* keeps the loss and the overrides .*, without resume="):
        train.start([*resume, change])


@LOOPS
def test_dr_grpo_divides_by_the_tokens_that_sampling_gives_after_a_resume(
    loop: list[str], begin: Begin, trained: list[Any]
) -> None:
    resume = begin("online.loss=dr_grpo", "online.sampler.max_new_tokens=8", *loop)
    assert train.start([*resume, "online.sampler.max_new_tokens=16"]) == 0
    assert train.start([*resume, "online.sampler.max_new_tokens=null", "train.max_length=96"]) == 0
    assert train.start(resume) == 0
    assert [each.loss["max_tokens"] for each in trained] == [16, 96, 8]


@LOOPS
@pytest.mark.parametrize("own", ["8", "7"])
def test_a_divisor_that_was_given_stays(own: str, loop: list[str], begin: Begin, trained: list[Any]) -> None:
    words = ["online.sampler.max_new_tokens=8", f"online.overrides=['loss.max_tokens={own}']"]
    assert train.start([*begin("online.loss=dr_grpo", *words, *loop), "online.sampler.max_new_tokens=16"]) == 0
    assert [each.loss["max_tokens"] for each in trained] == [int(own)]
