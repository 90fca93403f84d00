"""Ranks with other settings or other data are refused at the start, as are settings of accelerate that are not supported."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from halos.distributed import agreement, launch, strategies
from halos.distributed.replicated import Replicated
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
    for name in ("one", "other"):
        (tmp_path / name / "ownloss.py").write_text(f"# {name}\nfrom halos.losses.sft import sft as loss\n")
    own = ["loss._target_=ownloss.loss", "plugins=[ownloss]", f"data.train=[{tmp_path}/one/train.jsonl]"]
    done = start(f"cd=>{tmp_path / 'other'}", [*words, *own], tmp_path / "one")
    assert done.returncode == 1
    assert "error: the code of yours (by its hash) of rank 1 on" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_ranks_that_do_not_come_to_an_event_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    monkeypatch.setattr(agreement.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(agreement.dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(agreement, "world_size", lambda: 2)
    assert agreement.wait_for_all_ranks("one", 0.2) == 1
    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(lambda _: agreement.wait_for_all_ranks("two", 60.0), range(2))) == [2, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: fp16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"torch.compile \(dynamo_config\)"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "pass train.activation_checkpointing=true"),
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
        launch._refuse_unsupported(Obtained(), Replicated)  # type: ignore[arg-type]


def test_fsdp_1_is_refused_before_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setattr(launch, "form_process_group", lambda: pytest.fail("they meet"))
    with pytest.raises(UserError, match="fsdp_version: 2"):
        launch.make_accelerator("auto")


class Sliced(Replicated):
    """A strategy of its own, which launch.py has never heard of."""

    launched_as, needs_process_group = "Megatron-LM", True
    hidden_from_accelerate = ("ACCELERATE_USE_MEGATRON_LM",)

    @classmethod
    def is_requested(cls) -> bool:
        return "ACCELERATE_USE_MEGATRON_LM" in os.environ

    @classmethod
    def check_launch(cls) -> None:
        if "MEGATRON_LM_TP_DEGREE" not in os.environ:
            raise UserError("how many slices?")

    @classmethod
    def requests_bfloat16(cls) -> bool:
        return True


def test_what_a_new_strategy_needs_of_the_launch_is_declared_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    monkeypatch.setattr(launch, "requested_precision", lambda: None)

    seen: list[str | None] = []

    def accelerator(**settings: Any) -> Any:
        seen.append(os.environ.get("ACCELERATE_USE_MEGATRON_LM"))
        return SimpleNamespace(num_processes=1, gradient_accumulation_steps=1, **settings)

    monkeypatch.setattr(launch, "Accelerator", accelerator)
    with pytest.raises(UserError, match="asks for Megatron-LM, which is not supported"):
        launch.make_accelerator("bfloat16")
    monkeypatch.setattr(strategies, "STRATEGIES", (Sliced, *strategies.STRATEGIES))
    assert strategies.requested_strategy() is Sliced
    with pytest.raises(UserError, match="how many slices"):
        launch.make_accelerator("auto")
    monkeypatch.setenv("MEGATRON_LM_TP_DEGREE", "2")
    with pytest.raises(UserError, match="asks for Megatron-LM, but there is no process group"):
        launch.make_accelerator("auto")
    monkeypatch.setattr(launch.dist, "is_initialized", lambda: True)
    assert launch.make_accelerator("auto").mixed_precision == "bf16"
    assert seen[-1] is None, "accelerate would act on it"
    assert os.environ["ACCELERATE_USE_MEGATRON_LM"] == "true", "and children of this process see it"


def test_accumulation_that_accelerate_would_divide_by_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Obtained:
        mixed_precision, gradient_accumulation_steps, num_processes = "no", 4, 1

    with pytest.raises(UserError, match="gradient_accumulation_steps: 4"):
        launch._refuse_unsupported(Obtained(), Replicated)  # type: ignore[arg-type]


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
    monkeypatch.setattr(agreement, "gather_object", lambda mine: everyone)
    with pytest.raises(UserError, match=message):
        agreement.require_same_on_all_ranks(None, "data", "x")  # type: ignore[arg-type]
