"""Rollouts of a live loop on disk: what a row holds, which files stay, and what a full disk does."""

import errno
import gzip
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halos import confined
from halos.config.defaults import section
from halos.config.schema import Scorer
from halos.confined import UnreadableError
from halos.hashes import json_hash
from halos.online.live_rollouts import LiveRollouts
from halos.rollout import batch_files
from halos.rollout.scorers._reward_functions import parts_of
from halos.rollout.scorers.function import Functions
from halos.rollout.types import Origin, Prompt, Rollout, Sample, Score, requests_for

PROMPT = Prompt("p", ({"role": "user", "content": "?"},), "train", data={"prompt": "?", "tests": ["large"]})
SCORER = Functions(parts_of(["ends", {"function": "length", "target": 3}], []), section(Scorer), [])


def rollout(value: float | None = 1.5) -> Rollout:
    [request] = requests_for([PROMPT], samples=1, temperature=1.0, max_new_tokens=4, seed=0)
    sample = Sample.of(request, Origin("policy", "v"), "so", finish="stop", tokens=2, ids=(5, 1), logps=(-0.5, -1.0))
    return Rollout(sample, Score(value, "" if value else "took longer", parts={"ends": 1.0, "length": 0.5}, scorer="both"))


def run_in(path: Path, step: int = 0, *, main: bool = True) -> Any:
    return SimpleNamespace(main=main, step=step, directory=SimpleNamespace(path=path))


def files(keep: int | None = None, passes: int = 1) -> LiveRollouts:
    return LiveRollouts(keep=keep, passes=passes, scorer=SCORER)


def names(run: Any) -> list[int]:
    return list(batch_files.files_of(run.directory.path))


def test_a_row_has_tokens_scores_by_function_and_the_versions_that_gave_them(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    files(passes=4).write(run, 3, [rollout(), rollout(None)])
    path = tmp_path / "rollouts" / "000003.jsonl.gz"
    rows = list(batch_files.read(path, within=tmp_path))
    wanted = {"prompt_id": "p", "output_ids": [5, 1], "logps": [-0.5, -1.0], "finish": "stop", "reward": 1.5, "batch": 3,
              "step": 12, "parts": {"ends": 1.0, "length": 0.5}, "rewards_sha256": json_hash(SCORER.request())}  # fmt: skip
    assert {name: rows[0].get(name) for name in wanted} == wanted
    assert (rows[1]["reward"], rows[1]["problem"], "data" in rows[0]) == (None, "took longer", False)
    before = path.read_bytes()
    assert before[4:8] == bytes(4), "no time stands in it"
    files(passes=4).write(run, 3, [rollout(), rollout(None)])
    assert path.read_bytes() == before


@pytest.mark.parametrize(("keep", "left"), [(None, [0, 1, 2, 3]), (2, [2, 3]), (0, [])])
def test_the_last_files_stay(keep: int | None, left: list[int], tmp_path: Path) -> None:
    run = run_in(tmp_path)
    for number in range(4):
        files(keep).write(run, number, [rollout()])
    files(keep).write(run_in(tmp_path, main=False), 9, [rollout()])
    assert names(run) == left


@pytest.mark.parametrize(("step", "left"), [(0, []), (4, [0]), (5, [0, 1]), (8, [0, 1]), (11, [0, 1, 2])])
def test_files_of_batches_that_the_checkpoint_does_not_know_are_deleted(step: int, left: list[int], tmp_path: Path) -> None:
    for number in range(3):
        files().write(run_in(tmp_path), number, [rollout()])
    (tmp_path / "rollouts" / "train").mkdir()  # not ours
    files(passes=4).on_start(run_in(tmp_path, step))
    assert names(run_in(tmp_path)) == left


def test_a_full_disk_costs_a_warning_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(confined.os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        files().write(run_in(tmp_path), 0, [rollout()])
    assert "the rollouts of batch 0 could not be written" in caplog.text
    assert list((tmp_path / "rollouts").iterdir()) == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    files().write(run_in(tmp_path), 0, [rollout()])
    path = batch_files.files_of(tmp_path)[0]
    for damaged in (path.read_bytes()[:-9], b"no gzip", gzip.compress(b"no json\n")):
        path.write_bytes(damaged)
        with pytest.raises(UnreadableError, match=r"000000.jsonl.gz"):
            list(batch_files.read(path, within=tmp_path))
