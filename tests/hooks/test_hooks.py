"""Trackers that cannot stop a run, early stopping, and a hook of the user's own."""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from halos.config.schema import Config, Objective
from halos.errors import UserError
from halos.hooks.base import Hook, states_of
from halos.hooks.early_stopping import EarlyStopping
from halos.hooks.log import summary
from halos.hooks.trackers import Wandb
from halos.run.lifecycle import run
from halos.trainers.base import Trainer

FEW = ["loss=sft", "train.steps=3", "train.batch_size=8", "checkpoint.every=null", "train.eval_every=1"]


def test_wandb_goes_offline_where_there_is_no_key_and_says_so(
    configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    excepthook = sys.excepthook
    assert run(configure(*FEW, "logging=wandb"), []) == 0
    assert sys.excepthook is excepthook, "wandb's would write tracebacks without hiding secrets"
    assert "wandb: no key found" in (tmp_path / "run" / "train.log").read_text()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"split": "train"') == 3


def test_wandb_asked_for_online_without_a_key_is_refused_and_never_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="needs a key"):
        Wandb(project="x", entity=None, mode="online").check(SimpleNamespace(main=True))  # type: ignore[arg-type]


def test_tensorboard_shows_what_metrics_jsonl_holds(configure: Callable[..., Config], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(configure(*FEW, "logging=tensorboard"), []) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = [(row["step"], row["loss"]) for row in rows if row["split"] == "train"]
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)


def test_tensorboard_hides_the_points_of_an_attempt_that_died_before_its_first_checkpoint(
    configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def die(trainer: Trainer, *given: Any) -> Any:
        if trainer.run.step == 2:
            raise KeyboardInterrupt
        return whole(trainer, *given)

    whole = Trainer._backward
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_backward", die)
        with pytest.raises(KeyboardInterrupt):
            run(configure(*FEW, "logging=tensorboard", "train.log_every=1", "train.steps=3"), [])
    assert (
        run(configure(*FEW, "logging=tensorboard", "train.log_every=1", "train.steps=3", f"resume={tmp_path / 'run'}"), []) == 0
    )
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_early_stopping_counts_evaluations_without_improvement_and_remembers_them() -> None:
    current: Any = SimpleNamespace(config=SimpleNamespace(objective=Objective("loss", "min")), stop=None, step=1, total_steps=9)
    hook = EarlyStopping(patience=2)
    for value in (1.0, 0.9, 0.95):
        hook.on_eval(current, {"loss": value})
    resumed = EarlyStopping(patience=2)
    resumed.load_state_dict(hook.state_dict())
    assert current.stop is None
    resumed.on_eval(current, {"loss": 0.9})
    assert current.stop.finished
    assert "has not improved on 0.9" in current.stop.reason


def test_an_objective_that_is_never_a_number_is_no_improvement() -> None:
    current: Any = SimpleNamespace(config=SimpleNamespace(objective=Objective("loss", "min")), stop=None, step=1, total_steps=9)
    hook = EarlyStopping(patience=2)
    hook.on_eval(current, {"loss": math.nan})
    assert current.stop is None
    hook.on_eval(current, {"loss": math.nan})
    assert current.stop.reason == "loss has been nan for 2 evaluations"


def test_a_run_that_stops_early_is_finished_with_a_final_model(configure: Callable[..., Config], tmp_path: Path) -> None:
    words = ["loss=sft", "train.steps=9", "train.batch_size=8", "train.eval_every=1", "optim.lr=1e-12", "train.early_stopping=2"]
    assert run(configure(*words, "objective.metric=loss", "checkpoint.every=null"), []) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["step"] < 9) == ("finished", True)
    assert (tmp_path / "run" / "FINAL" / "model.safetensors").exists()


HOOK = '''
from halos.hooks.base import Hook


class Note(Hook):
    """Writes a file into every checkpoint, and counts across resumes."""

    def __init__(self, *, text: str) -> None:
        self.text, self.saves = text, 0

    def on_save(self, run, path, *, final):
        self.saves += 1
        if run.main:
            (path / "note.txt").write_text(f"{self.text} {self.saves}")

    def state_dict(self):
        return {"saves": self.saves}

    def load_state_dict(self, state):
        self.saves = state.get("saves", 0)
'''


def test_a_hook_from_the_users_own_package_works_and_needs_plugins(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = [*FEW[:3], "checkpoint.every=2", "exp_name=noted", "+hooks.note={_target_: mine.Note, text: hello}"]
    refused = command(*words, check=False)
    assert refused.returncode == 2
    assert "plugins=[mine]" in refused.stderr
    command(*words, "plugins=[mine]")
    assert (tmp_path / "noted" / "checkpoints" / "step-00000002" / "note.txt").read_text() == "hello 1"
    assert (tmp_path / "noted" / "FINAL" / "note.txt").read_text() == "hello 2"
    listed = json.loads((tmp_path / "noted" / "FINAL" / "manifest.json").read_text())["files"]
    assert "note.txt" in listed


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("metrics", "choose another"),
        ("live_batch", "choose another"),
        ("checkpoint", "a policy of yours is checkpoint._target_"),
        ("progress", ""),
        ("alarms", ""),
    ],
)
def test_a_hook_takes_the_place_of_no_built_in_one_without_which_a_run_is_not_whole(
    name: str, refused: str, configure: Callable[..., Config]
) -> None:
    config = configure(*FEW, f"+hooks.{name}={{_target_: halos.hooks.progress.ProgressBar}}", "dry_run=true")
    if not refused:
        assert run(config, []) == 0
        return
    with pytest.raises(UserError, match=f"hooks.{name} is the name of a hook without which .*: {refused}"):
        run(config, [])


def test_jobs_of_a_sweep_have_names_of_their_own_in_one_group() -> None:
    from halos.hooks.trackers import names_of
    from halos.rundir import RunDir

    def named(place: str) -> Any:
        return names_of(SimpleNamespace(directory=RunDir(place), config=SimpleNamespace(exp_name="grid")))  # type: ignore[arg-type]

    assert named("runs/grid/optim.lr-1e-4-0f3a91bc") == ("optim.lr-1e-4-0f3a91bc", "grid")
    assert named("runs/grid") == ("grid", None)
    assert named("elsewhere/of/mine") == ("grid", None)


def test_the_line_of_an_evaluation_has_the_objective_of_a_hook_too() -> None:
    measured = {"step": 5, "loss": 0.5, "sums/accuracy": 0.25, "sums/other": 1.0}
    assert summary(measured, objective="sums/accuracy") == "loss 0.5  sums/accuracy 0.25"
    assert summary(measured, objective="loss") == summary(measured) == "loss 0.5"


def test_metrics_lost_to_a_full_disk_are_counted_and_the_run_continues(caplog: pytest.LogCaptureFixture) -> None:
    from halos.hooks.log import MetricsLog

    def append(row: dict[str, Any]) -> None:
        if row["step"] in (2, 3):
            raise OSError(28, "No space left on device")
        kept.append(row["step"])

    kept = list[int]()
    run: Any = SimpleNamespace(main=True, directory=SimpleNamespace(append_metrics=append))
    hook = MetricsLog()
    with caplog.at_level("WARNING"):
        logging.getLogger("halos").propagate = True
        for step in range(1, 5):
            hook.on_step(run, {"step": step, "split": "train"})
        hook.on_end(run)
    assert kept == [1, 4]
    told = dict.fromkeys(record.getMessage()[:30] for record in caplog.records)  # the root's handler may hear them twice
    assert list(told) == [
        "metrics.jsonl cannot be writte",
        "2 lines are missing from metri",
    ]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"seen": {3: 1}}, r"hooks.mine: state_dict\(\)\['seen'\] has the key 3 of type int: it is kept as JSON"),
        ({"seen": [1, (2, 3)]}, r"state_dict\(\)\['seen'\]\[1\] is of type tuple"),
        ({"count": np.int64(3)}, r"state_dict\(\)\['count'\] is of type int64"),
        (None, r"hooks.mine: state_dict\(\) is of type NoneType: return a dict"),
    ],
)
def test_a_state_that_json_would_change_is_refused_by_hook_and_key(state: Any, said: str) -> None:
    fine = {"best": math.nan, "seen": {"3": [1, 2.5, None, True]}, "name": "x", "mean": np.float64(0.1)}
    assert states_of({"mine": Stateful(fine)}) == {"mine": fine}
    with pytest.raises(UserError, match=said):
        states_of({"mine": Stateful(state)})


def test_a_state_that_no_checkpoint_can_keep_stops_the_run_around_the_first_step_or_before_the_checkpoint(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    words = ["loss=sft", "data.eval=[]", "train.steps=3", "train.batch_size=4", "checkpoint.every=1"]
    made = trainer(*words)
    mine = made.run.hooks["mine"] = Stateful({"seen": {1: 1}})
    with pytest.raises(UserError, match=r"hooks\.mine: .* has the key 1 of type int"):
        made.fit()
    assert made.run.step == 0
    mine.state, mine.bad_after = {}, 1
    with pytest.raises(UserError, match=r"is of type set"):
        made.fit()
    assert not (tmp_path / "run" / "checkpoints").exists()
    made.run.step, mine.state, mine.bad_after = 0, {}, 2
    with pytest.raises(UserError, match=r"hooks.mine: state_dict\(\)\['steps'\] is of type set"):
        made.fit()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    made.run.call_hooks(lambda hook: hook.on_end(made.run))


class Stateful(Hook):
    """Has the given state; after `bad_after` steps one that JSON cannot hold."""

    def __init__(self, state: Any) -> None:
        self.state, self.bad_after = state, 99

    def on_step(self, run: Any, metrics: Any) -> None:
        if run.step == self.bad_after:
            self.state = {"steps": {run.step}}

    def state_dict(self) -> Any:
        return self.state
