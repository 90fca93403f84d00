"""A run's directory: which runs may start or resume in it, and files that are complete or absent."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from halos import seals
from halos.errors import UserError
from halos.rundir import RunDir, is_run, job_name


def begun(path, status="running"):
    run = RunDir(path)
    run.create(overwrite=False)
    run.write_config("seed: 0\n")
    run.write_result(status, 3, {})
    return run


def said(action):
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


# --- beginning


def test_a_new_run_makes_its_directory_and_nothing_before(tmp_path):
    run = RunDir(tmp_path / "runs" / "demo")
    assert not (tmp_path / "runs").exists()
    run.create(overwrite=False)
    run.write_config("seed: 0\n")
    assert is_run(run.path)
    assert run.read_config() == "seed: 0\n"
    assert (run.checkpoints, run.final, run.log_of(0)) == (run.path / "checkpoints", run.path / "FINAL", run.path / "train.log")


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_unfinished_run_is_never_replaced_and_the_message_says_how_to_resume(tmp_path, status, overwrite):
    run = begun(tmp_path / "demo", status)
    message = said(lambda: RunDir(run.path).create(overwrite=overwrite))
    assert f"python train.py resume={run.path}" in message
    assert run.read_config() == "seed: 0\n"


def test_the_page_of_a_dry_run_is_no_start_and_stays_when_a_run_starts_or_is_refused(tmp_path):
    run = RunDir(tmp_path / "demo")
    run.path.mkdir()
    (run.path / "dry_run.html").write_text("page")
    assert not is_run(run.path)
    run.create(overwrite=False)
    run.write_config("seed: 0\n")
    run.remove_refused_start()
    assert os.listdir(run.path) == ["dry_run.html"]
    (run.path / "mine").write_text("x")
    assert "mine is in it" in said(lambda: run.create(overwrite=False))


def test_a_finished_run_is_replaced_only_when_asked(tmp_path):
    run = begun(tmp_path / "demo", "finished")
    (run.path / "old").write_text("x")
    assert "overwrite=true" in said(lambda: run.create(overwrite=False))
    run.create(overwrite=True)
    assert sorted(os.listdir(run.path)) == ["attempts"]
    assert sorted(os.listdir(tmp_path)) == ["demo"]


def test_a_finished_run_behind_a_link_is_replaced_where_it_lies(tmp_path):
    run = begun(tmp_path / "disk" / "demo", "finished")
    (tmp_path / "demo").symlink_to(run.path)
    RunDir(tmp_path / "demo").create(overwrite=True)
    assert (tmp_path / "demo").is_symlink()
    assert os.listdir(run.path) == ["attempts"]


def test_the_directory_that_one_is_in_is_not_deleted(tmp_path, monkeypatch):
    run = begun(tmp_path / "demo", "finished")
    (run.path / "sub").mkdir()
    monkeypatch.chdir(run.path / "sub")
    assert "which you are in" in said(lambda: run.create(overwrite=True))
    assert run.config.exists()


@pytest.mark.parametrize("name", ["notes.txt", ".git", "config.yaml"])
def test_a_directory_that_is_no_run_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    assert name in said(lambda: RunDir(tmp_path).create(overwrite=True))
    assert (tmp_path / name).read_text() == "mine"


def test_leftovers_of_a_start_that_died_are_replaced(tmp_path):
    run = RunDir(tmp_path / "demo")
    run.create(overwrite=False)
    (run.path / ".config.yaml.123").write_text("half")
    run.log_of(0).write_text("line")
    run.create(overwrite=False)
    assert os.listdir(run.path) == ["attempts"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "demo").write_text("")
    assert "is a file" in said(lambda: RunDir(tmp_path / "demo").create(overwrite=False))


def test_a_sweep_and_a_run_share_no_name(tmp_path):
    begun(tmp_path / "sweep" / "a-1", "finished")
    assert "holds a sweep" in said(lambda: RunDir(tmp_path / "sweep").create(overwrite=True))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "multirun.yaml").write_text("")
    assert "holds a sweep" in said(lambda: RunDir(tmp_path / "other").create(overwrite=False))
    run = begun(tmp_path / "run")
    assert "is a run already" in said(lambda: RunDir(run.path / "a-1").create(overwrite=False))


def test_asking_changes_nothing(tmp_path):
    run = begun(tmp_path / "demo", "finished")
    run.refuse_occupied(overwrite=True)
    RunDir(tmp_path / "new").refuse_occupied(overwrite=False)
    assert run.config.exists()
    assert os.listdir(tmp_path) == ["demo"]


def test_a_lock_is_no_obstacle_and_stays(tmp_path):
    run = begun(tmp_path / "demo", "finished")
    with run.lock() as lock:
        lock.acquire(1)
        run.create(overwrite=True)
        assert sorted(os.listdir(run.path)) == ["attempts", "run.lock"]
    (run.path / ".run.lock.7-abc").write_text("{}")
    RunDir(run.path).refuse_occupied(overwrite=False)


@pytest.mark.parametrize("moves", range(6))
def test_a_crash_in_the_middle_of_an_overwrite_leaves_what_can_be_replaced(tmp_path, monkeypatch, moves):
    run = begun(tmp_path / "demo", "finished")
    run.start_attempt({})
    (run.path / "FINAL").mkdir()
    rename, left = Path.rename, iter(range(moves))

    def crash(self, target):
        if next(left, None) is None:
            raise OSError("power cut")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    try:
        run.create(overwrite=True)
    except OSError:
        monkeypatch.undo()
        run.create(overwrite=True)
    assert os.listdir(run.path) == ["attempts"]


# --- going on


def test_a_run_opens_by_its_directory_or_one_of_its_checkpoints(tmp_path):
    run = begun(tmp_path / "demo")
    save = run.checkpoints / "step-00000010"
    save.mkdir(parents=True)
    for asked, checkpoint in ((str(run.path), None), (f"{run.path}/", None), (str(save), save)):
        found = RunDir.of_resume(asked)
        found.require_run()
        assert found.path == run.path
        assert found.requested_checkpoint(asked) == checkpoint
    assert run.requested_checkpoint(None) is None


def test_a_missing_checkpoint_is_refused_with_a_list_of_existing_ones(tmp_path):
    run = begun(tmp_path / "demo")
    assert "there are none" in said(lambda: run.requested_checkpoint(f"{run.path}/checkpoints/step-7"))
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    assert "step-00000010" in said(lambda: run.requested_checkpoint(f"{run.path}/checkpoints/step-7"))


def test_a_path_that_is_no_run_is_refused_with_a_suggestion(tmp_path):
    begun(tmp_path / "runs" / "demo")
    begun(tmp_path / "runs" / "other")
    assert f"did you mean {tmp_path}/runs/demo?" in said(RunDir(tmp_path / "runs" / "dmo").require_run)
    assert "holds demo, other" in said(RunDir(tmp_path / "runs" / "zzzzzz").require_run)
    assert f"such as {tmp_path}/runs/demo" in said(RunDir(tmp_path / "runs").require_run)
    (tmp_path / "runs" / "demo" / "FINAL").mkdir()
    assert f"resume={tmp_path}/runs/demo" in said(RunDir(tmp_path / "runs" / "demo" / "FINAL").require_run)
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    assert "no config.yaml" in said(RunDir(tmp_path / "empty" / "sub").require_run)
    assert "holds no runs" in said(RunDir(tmp_path / "nowhere" / "x").require_run)


def test_newer_checkpoints_are_set_aside_whole_with_their_metrics(tmp_path):
    run = begun(tmp_path / "demo")
    run.start_attempt({})
    for step in (2, 4, 10):
        (run.checkpoints / f"step-{step:08d}" / "state").mkdir(parents=True)
        run.append_metrics({"step": step})
    run.final.mkdir()
    place, moved = run.set_aside(2, final=False)
    assert moved == ["step-00000010", "step-00000004"]
    assert place == run.checkpoints / "superseded-001"
    assert sorted(os.listdir(place)) == ["metrics.jsonl", "step-00000004", "step-00000010"]
    assert (place / "step-00000010" / "state").is_dir()
    assert (place / "metrics.jsonl").read_text() == '{"step": 4}\n{"step": 10}\n'
    assert list(run.checkpoints_by_step()) == [2]
    assert run.final.is_dir()
    assert run.set_aside(2, final=True)[1] == ["FINAL"]
    assert run.set_aside(2, final=True)[1] == []
    with pytest.raises(UserError, match="was set aside"):
        RunDir.of_resume(str(place / "step-00000010"))


def test_a_crash_while_setting_aside_leaves_no_gap(tmp_path, monkeypatch):
    run = begun(tmp_path / "demo")
    for step in (2, 4, 6):
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    rename = Path.rename

    def crash(self, target):
        if self.name == "step-00000004":
            raise OSError("power cut")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(OSError, match="power cut"):
        run.set_aside(2, final=False)
    assert list(run.checkpoints_by_step()) == [2, 4]


# --- files


def test_the_configuration_is_written_once(tmp_path):
    run = begun(tmp_path / "demo")
    with pytest.raises(AssertionError):
        run.write_config("seed: 1\n")


def test_attempts_are_numbered(tmp_path):
    run = begun(tmp_path / "demo")
    assert [run.start_attempt({"typed": ["a=ü"], "world_size": 2}) for _ in range(3)] == [0, 1, 2]
    text = (run.path / "attempts" / "002.yaml").read_text()
    assert yaml.safe_load(text).items() >= {"typed": ["a=ü"], "world_size": 2}.items()
    assert seals.is_whole(text)
    assert seals.faults(run.read_config(), run.read_attempts()) == {}
    (run.path / "attempts" / "10x.yaml").write_text("")
    assert run.next_attempt() == 3


def test_metrics_come_back_as_they_went_with_null_for_what_is_no_number(tmp_path):
    run = begun(tmp_path / "demo")
    run.append_metrics({"step": 1, "loss": float("nan"), "parts": [float("inf"), 1.5], "split": "train"})
    run.append_metrics({"step": 2, "loss": 0.25})
    assert run.read_metrics() == [{"step": 1, "loss": None, "parts": [None, 1.5], "split": "train"}, {"step": 2, "loss": 0.25}]


def test_a_torn_last_line_is_passed_over_and_then_gone(tmp_path):
    run = begun(tmp_path / "demo")
    run.append_metrics({"step": 1})
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "lo')
    assert run.read_metrics() == [{"step": 1}]
    run.truncate_metrics(5)
    run.append_metrics({"step": 2})
    assert [row["step"] for row in run.read_metrics()] == [1, 2]


def test_after_a_resume_no_step_appears_twice(tmp_path):
    run = begun(tmp_path / "demo")
    for step in range(6):
        run.append_metrics({"step": step})
    run.truncate_metrics(3)
    for step in range(4, 8):
        run.append_metrics({"step": step})
    assert [row["step"] for row in run.read_metrics()] == list(range(8))


@pytest.mark.parametrize(
    "line", [b"{", b"\xff\xfe", b'{"step": "2"}', b'{"step": 2, "loss": {}}', b"[]", b'{"step": 2, "x": ' + b"1" * 5000 + b"}",
             b"[" * 10**5, b'{"step": 2, "split": 5}', b'{"step": 2, "\\ud800": 1}', b'{"loss": 1}'],
)  # fmt: skip
def test_a_damaged_line_of_metrics_loses_only_itself_and_is_set_aside(tmp_path, line):
    run = begun(tmp_path / "demo")
    run.append_metrics({"step": 1})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    run.append_metrics({"step": 3})
    assert [row["step"] for row in run.read_metrics()] == [1, 3]
    assert (len(run.metrics.damaged()), run.truncate_metrics(5)) == (1, 1)
    assert len((run.path / "metrics.damaged.jsonl").read_text().splitlines()) == 1
    assert ([row["step"] for row in run.read_metrics()], run.metrics.damaged()) == ([1, 3], [])


def test_the_result_is_written_on_a_full_disk(tmp_path, monkeypatch):
    run = begun(tmp_path / "demo")
    run.write_result("running", 0, {})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("halos.confined.write_whole", full)
        run.write_result("failed", 7, {"loss": 1.5}, reason="the disk is full")
    assert run.read_result() == {"status": "failed", "step": 7, "metrics": {"loss": 1.5}, "reason": "the disk is full"}
    run.write_result("running", 7, {})
    run.write_result("finished", 8, {})
    assert sorted(path.name for path in run.path.iterdir() if path.name.startswith(".")) == []


def test_missing_attempt_records_are_reported(tmp_path):
    run = begun(tmp_path / "demo")
    run.checkpoints.mkdir()
    shutil.rmtree(run.path / "attempts")
    with pytest.raises(UserError, match=r"attempts/, the record of its starts, is missing"):
        run.require_run()


def test_the_result_has_status_step_and_reason(tmp_path):
    run = RunDir(tmp_path / "demo")
    assert run.read_result() is None
    run = begun(tmp_path / "demo")
    assert not run.is_finished()
    run.write_result("finished", 7, {"loss": float("inf")})
    assert run.is_finished()
    assert run.read_result() == {"status": "finished", "step": 7, "metrics": {"loss": None}}
    run.write_result("failed", 7, {}, reason="out of memory")
    assert run.read_result()["reason"] == "out of memory"
    for broken in ("", "[]", '{"status": "fin'):
        (run.path / "result.json").write_text(broken)
        assert run.read_result() is None
        assert not run.is_finished()


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    run = begun(tmp_path / "demo")
    run.write_result("running", 7, {"loss": 1.0})

    def fail(source, target):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        run.write_result("finished", 8, {})
    assert json.loads((run.path / "result.json").read_text())["step"] == 7


def test_a_job_is_named_by_its_overrides_in_any_order():
    name = job_name(["loss=dpo", "++optim.lr=1e-05", "exp_name=sweep"])
    assert name == job_name(["optim.lr=1e-05", "exp_name=other", "loss=dpo"])
    assert name.startswith("loss-dpo__optim.lr-1e-05-")
    assert job_name(["loss=dpo", "optim.lr=1e-05"], ["loss"]) == name.removeprefix("loss-dpo__")
    assert name != job_name(["loss=dpo", "optim.lr=1e-04", "exp_name=sweep"])
    wild = job_name(["data.train=[/a/b c.jsonl,{path: x}]", "x=" + "y" * 300])
    assert len(wild) < 100
    assert Path(wild).name == wild
