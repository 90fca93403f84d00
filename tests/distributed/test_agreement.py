"""Ranks with other settings or other data are refused at the start, as are settings of accelerate that are not supported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halos.distributed import launch
from halos.errors import UserError
from tests import processes

ROOT = Path(__file__).resolve().parents[2]


def start(change: str, words: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    script = str(Path(__file__).with_name("differing.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, "1", change, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return processes.run(command, capture_output=True, text=True, check=False, env=environment, cwd=place)


def test_ranks_with_other_settings_or_data_are_refused_before_a_run_begins(tmp_path: Path, cache: Path) -> None:
    for number, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{n}?", "completion": f"{n + number}"} for n in range(8)]
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["loss=sft", "model=tiny", "data.train=[/proc/self/cwd/train.jsonl]", "data.eval=[]", f"cache_dir={cache}",
             "exp_name=run",
             f"output_root={tmp_path}", "seed=0", "train.steps=2"]  # fmt: skip
    done = start("seed=0=>seed=1", words, tmp_path / "one")
    assert done.returncode == 1
    assert "error: the configuration of rank 1 on" in done.stderr, done.stderr
    assert "seed: 1 instead of seed: 0" in done.stderr
    done = start(f"cd=>{tmp_path / 'other'}", words, tmp_path / "one")
    assert done.returncode == 1
    assert "error: the data.train (by its hash) of rank 1 on" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: fp16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"torch.compile \(dynamo_config\)"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "pass train.activation_checkpointing=true"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"WORLD_SIZE": "2"}, "2 processes were launched, but each sees 1"),
    ],
)
def test_an_unsupported_setting_of_an_accelerate_config_is_refused(
    settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    class Obtained:
        mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        gradient_accumulation_steps = 1
        num_processes = 1

    with pytest.raises(UserError, match=message):
        launch._refuse_unsupported(Obtained())  # type: ignore[arg-type]


def test_accumulation_that_accelerate_would_divide_by_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Obtained:
        mixed_precision, gradient_accumulation_steps, num_processes = "no", 4, 1

    with pytest.raises(UserError, match="gradient_accumulation_steps: 4"):
        launch._refuse_unsupported(Obtained())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("everyone", "message"),
    [
        ([("a", "x", None), ("b", "x", "b.jsonl: there is no such file")], "rank 1 on b: b.jsonl: there is no such file"),
        ([("a", None, "bad row"), ("a", None, "bad row")], "^bad row$"),
        ([("a", "1\n2", None), ("b", "1\n3", None)], "of rank 1 on b is not that of rank 0 on a: 3 instead of 2"),
        ([("a", "1", None), ("b", "1\n3", None)], "3 instead of nothing"),
    ],
)
def test_every_rank_raises_the_problem_of_one(everyone, message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "gather_object", lambda mine: everyone)
    with pytest.raises(UserError, match=message):
        launch.require_same_on_all_ranks(None, "data", "x")  # type: ignore[arg-type]
