"""Each alarm on a stream of metrics that should raise it, and none on a healthy one; what it knows survives a resume."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from halos.config.schema import Config
from halos.hooks.alarms import Alarms
from halos.run.lifecycle import run
from halos.rundir import RunDir

Stream = Callable[[int], dict[str, float]]


class Stub:
    """What the hook needs of a run."""

    def __init__(self, path: Path) -> None:
        self.directory, self.main, self.step, self.stop = RunDir(path), True, 0, None

    @staticmethod
    def rows_of_step(step: int) -> list[str]:
        return [f"pairs.jsonl:{4 * step + n}" for n in range(4)]


def healthy(step: int) -> dict[str, float]:
    wave = 0.01 * (step % 3)
    return {"loss": 0.69 - 0.001 * step + wave, "grad_norm": 1.0 + wave, "logps/chosen": -50.0 - 0.05 * step,
            "rewards/accuracies": 0.5 + 0.002 * step, "length": 100.0 + step / 4, "z0": 0.1 * (step % 2), "kl": 0.1 * (step % 2),
            "clip_fraction": 0.1, "groups/all_equal": 0.5, "mismatch/ess": 0.95}  # fmt: skip


def played(stub: Stub, alarms: Alarms, stream: Stream, steps: range) -> None:
    for stub.step in steps:
        alarms.on_step(stub, stream(stub.step))  # type: ignore[arg-type]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, "halos.hooks.alarms"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "halos.hooks.alarms"]


def alarms(act: Literal["warn", "stop"] = "warn") -> Alarms:
    return Alarms(act=act, patience=5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda n: {"logps/chosen": -50.0 - 2 * n, "rewards/accuracies": 0.5 + 0.02 * n}, "the chosen completions become less"),
        (lambda n: {"length": 100.0 + 10 * n}, "sampled completions went from 130 to 200"),
        (lambda n: {"length": 100.0 - 6 * n}, "sampled completions went from 82 to 52"),
        (lambda n: {"z0": 0.0, "kl": -0.5}, "z0 was 0 in the last 5 logged steps (its estimate, kl, is -0.5 on average"),
        (lambda n: {"clip_fraction": 0.5}, "the clip acts on 50% of the tokens"),
        (lambda n: {"loss": 0.693147}, "the loss is still what it was at the start, 0.693147, after 10 logged steps"),
        (lambda n: {"groups/all_equal": 1.0}, "of 100% of the prompts all rewards are equal"),
        (lambda n: {"mismatch/ess": 0.3}, "that they count as 30% of their number"),
        (lambda n: {"grad_norm": 30.0 if n == 8 else 1.0}, "step 8: the gradient norm is 30, 30 times that of the steps before"),
    ],
)  # fmt: skip
def test_a_condition_is_said_once_with_what_to_try(
    changed: Stream, words: str, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    stub, hook = Stub(tmp_path), alarms()
    played(stub, hook, lambda n: healthy(n) | changed(n), range(1, 16))
    (message,) = said()
    assert words in message
    assert "ry " in message or "helps" in message
    assert stub.stop is None


@pytest.mark.parametrize(
    "changed",
    [
        lambda n: {},
        lambda n: {"logps/chosen": -50.0 - 2 * n, "rewards/accuracies": 0.5},  # the margin does not grow
        lambda n: {"z0": 0.0, "kl": 0.0},  # the policy is still its reference
        lambda n: {"loss": 0.0},
        lambda n: {"grad_norm": 30.0 if n == 3 else 1.0},  # too few steps before it
        lambda n: {"loss": float("nan"), "grad_norm": float("nan")},  # the guard's own
    ],
)
def test_no_alarm_without_its_condition(changed: Stream, tmp_path: Path, said: Callable[[], list[str]]) -> None:
    played(Stub(tmp_path), alarms(), lambda n: healthy(n) | changed(n), range(1, 30))
    assert said() == []


def test_stop_ends_the_run_at_the_first_alarm_and_says_why(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    stub = Stub(tmp_path)
    played(stub, alarms("stop"), lambda n: healthy(n) | {"clip_fraction": 0.5}, range(1, 7))
    assert stub.stop is not None
    assert (stub.stop.finished, stub.stop.failed) == (False, False)
    assert stub.stop.reason.startswith("train.alarms=stop: the clip acts on 50%")


def test_steps_that_are_not_logged_are_not_looked_at_and_the_rows_of_all_are_named(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    """With train.log_every=2 a logged gradient norm is that of two steps."""
    stub, hook = Stub(tmp_path), alarms()
    played(stub, hook, lambda n: {} if n % 2 else healthy(n) | {"grad_norm": 30.0 if n == 12 else 1.0}, range(1, 14))
    (message,) = said()
    assert "pairs.jsonl:40, pairs.jsonl:41, pairs.jsonl:42 and 5 more" in message
    (record,) = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert (record["step"], record["spike"], record["grad_norm"]) == (12, True, 30.0)
    assert [row["id"] for row in record["rows"]] == [f"pairs.jsonl:{n}" for n in range(40, 48)]


def test_a_resumed_run_knows_the_start_and_repeats_no_warning(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    def stream(step: int) -> dict[str, float]:
        return healthy(step) | {"length": 100.0 + 10 * step, "clip_fraction": 0.5 if step < 8 else 0.1}

    whole, first, second = alarms(), alarms(), alarms()
    played(Stub(tmp_path), whole, stream, range(1, 16))
    uninterrupted = said()
    assert len(uninterrupted) == 2
    played(Stub(tmp_path), first, stream, range(1, 8))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    played(Stub(tmp_path), second, stream, range(8, 16))
    assert said()[2:] == uninterrupted
    assert second.state_dict() == whole.state_dict()


def test_in_a_run_a_spike_names_the_rows_of_its_step(configure: Callable[..., Config], tmp_path: Path) -> None:
    """Thresholds that an ordinary step of training reaches: every gradient norm above the median of the two before."""
    words = ["loss=dpo", "train.steps=8", "train.batch_size=4", "train.eval_every=null", "checkpoint.every=null"]
    hook = "+hooks.alarms={_target_: halos.hooks.alarms.Alarms, act: stop, patience: 2, spike: 1.0001}"
    assert run(configure(*words, hook), []) == 1
    log, result = (tmp_path / "run" / "train.log").read_text(), json.loads((tmp_path / "run" / "result.json").read_text())
    assert "train.alarms=stop: the gradient norm is" in result["reason"]
    record = json.loads((tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()[0])
    assert (len(record["rows"]), record["step"]) == (4, result["step"])
    assert f"step {record['step']}: the gradient norm is" in log
    assert all(any(character.isdigit() for character in row["id"]) for row in record["rows"])
    assert record["rows"][0]["id"] in log


def test_they_are_on_by_default_and_off_by_a_key(configure: Callable[..., Config]) -> None:
    from halos.config.bind import bind_loss
    from halos.run.prepare import hooks_of

    by_default, off = configure("loss=dpo"), configure("loss=dpo", "train.alarms=off")
    loss = bind_loss(by_default.loss, [])
    assert isinstance(hooks_of(by_default, loss)[1]["alarms"], Alarms)
    assert "alarms" not in hooks_of(off, loss)[1]
