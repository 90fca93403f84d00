"""A run that is out of memory reports which keys help, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from halos.config.schema import Config

GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory is large try ..."
)
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


@pytest.mark.parametrize("error", [GPU, CPU], ids=["gpu", "cpu"])
def test_out_of_memory_is_one_message_with_the_keys_that_help_and_the_traceback_is_in_the_log(
    error: Exception, configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from halos.run.lifecycle import run
    from halos.rundir import RunDir
    from halos.trainers.base import Trainer

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "step", fail)
    words = ["loss=sft", "train.steps=2", "train.batch_size=8", "train.microbatch_size=8", "train.eval_at_start=false"]
    assert run(configure(*words), []) == 1
    said = "".join(capsys.readouterr())
    assert (
        "train.microbatch_tokens=8192 train.microbatch_size=4 (the same results up to rounding, unless the model has dropout)"
        in said
    )
    assert all(key in said for key in ("train.activation_checkpointing=true", "peft=lora", "train.max_length below"))
    assert "Traceback" not in said
    assert "If reserved" not in said
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
    result = RunDir(tmp_path / "run").read_result()
    assert result is not None
    assert result["status"] == "failed"


def test_a_smaller_microbatch_is_said_to_change_what_loras_dropout_drops(configure: Callable[..., Config]) -> None:
    from halos.trainers.memory import remedies

    assert "activation_checkpointing" not in remedies(configure("loss=sft"), checkpointed=True), "it does already"
    assert "activation_checkpointing=true" in remedies(configure("loss=sft"), checkpointed=False)
    said = remedies(configure("loss=sft", "peft=lora", "peft.lora_dropout=0.1", "train.microbatch_size=8"))
    both = "train.microbatch_tokens=8192 train.microbatch_size=4"
    assert f"{both} (dropout then drops other elements: a resume needs resume_changes=allow)" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "train.microbatch_tokens=8192 ("),
        (["train.microbatch_tokens=null", "train.microbatch_size=8"], "train.microbatch_size=4 ("),
        (["train.microbatch_tokens=null"], "train.microbatch_size=1 ("),
    ],
)
def test_the_bounds_that_a_run_has_are_named(words: list[str], said: str, configure: Callable[..., Config]) -> None:
    from halos.trainers.memory import remedies

    assert remedies(configure("loss=sft", *words)).startswith(said)


def test_other_errors_are_not_taken_for_out_of_memory(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    from halos.run.lifecycle import run
    from halos.trainers.base import Trainer

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Trainer, "step", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(configure("loss=sft", "train.steps=2", "train.batch_size=8", "train.eval_at_start=false"), [])
