"""The state of a job, read from its files."""

import json
from dataclasses import replace

import pytest

from halos.distributed.children import failure_reason
from halos.rundir import RunDir
from halos.sweep.job import Job, Progress, distinct_overrides, progress


@pytest.fixture
def job(tmp_path):
    return Job(0, ("loss=dpo", "seed=1"), "seed=1", tmp_path / "run", tmp_path / "logs" / "run.log")


def test_jobs_are_labelled_by_the_overrides_that_not_all_share():
    assert distinct_overrides([["loss=dpo", "++a.b=1", "c=2"], ["loss=dpo", "++a.b=2", "c=2"]]) == ["a.b=1", "a.b=2"]
    assert distinct_overrides([["loss=dpo", "c=2"]]) == ["loss=dpo c=2"]


def test_progress_is_the_last_training_row_also_when_the_file_is_being_written(job):
    assert progress(job) == Progress(0, None, None)
    run = RunDir(job.path)
    run.create(overwrite=False)
    run.write_config("seed: 0\n")
    run.start_attempt({"total_steps": 40})
    for step in (1, 2):
        run.append_metrics({"step": step, "split": "train", "loss": step / 2})
    run.append_metrics({"step": 2, "split": "eval", "loss": 9.0})
    with (job.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "sp')
    assert progress(job) == Progress(2, 40, 1.0)


def test_the_objective_is_the_run_s_own_and_none_until_it_is_finished(job):
    run = RunDir(job.path)
    run.create(overwrite=False)
    run.write_config("objective: {metric: rewards/accuracies, mode: max}\n")
    run.write_result("running", 3, {"rewards/accuracies": 0.25})
    assert job.objective() is None
    run.write_result("finished", 4, {"rewards/accuracies": 0.75, "loss": 1.0})
    assert job.objective() == 0.75
    assert not job.is_done()  # without FINAL
    run.final.mkdir()
    assert job.is_done()
    assert not replace(job, asks_no_more=False).is_done()


def test_the_last_words_of_a_failed_job_are_its_own_message_or_the_end_of_its_log(job):
    job.log.parent.mkdir()
    job.log.write_text("loss dpo\nerror: data.train.0: there is no file\nTraceback (most recent call last):\n  accelerate ...\n")
    assert failure_reason(job.log) == "error: data.train.0: there is no file"
    steps = "".join(f"\rtrain: {n}%" for n in range(50))
    job.log.write_text(f"{steps}\nTraceback (most recent call last):\n  File x\nValueError: it broke\n")
    assert failure_reason(job.log).splitlines()[-1] == "ValueError: it broke"
    report = "Traceback (most recent call last):\n  File accelerate/commands/launch.py\nCalledProcessError: status 1\n"
    job.log.write_text(f"Traceback (most recent call last):\n  File x\nValueError: it broke\n{report}")
    assert "it broke" in failure_reason(job.log)
    job.log.write_text(json.dumps({}))
    assert failure_reason(job.log) == "{}"
    job.log.unlink()
    assert failure_reason(job.log) == "it printed nothing"
