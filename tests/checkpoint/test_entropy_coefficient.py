"""The coefficient of an entropy bonus that follows a target is training state."""

import json
from pathlib import Path

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file
from world import copied, resume, stopped

from halos.hooks.entropy import EntropyCoefficient
from halos.run.lifecycle import run

WORDS = ["loss=grpo", "loss.entropy_target=50", "loss.entropy_coefficient=0.5", "loss.entropy_step=0.25", "train.steps=4",
         "train.batch_size=8", "train.microbatch_size=3", "checkpoint.every=2", "checkpoint.keep_last=9", "train.max_length=128",
         "train.eval_at_start=false", "data.eval=[]", "optim.lr=1e-3"]  # fmt: skip


def coefficients(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row["entropy_coefficient"] for row in map(json.loads, lines) if row["split"] == "train"]


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_run_that_was_stopped_has_the_coefficients_and_weights_of_one_that_was_not(
    peft: str, tmp_path: Path, cache: Path
) -> None:
    config = compose(cache, tmp_path / "runs", *WORDS, f"peft={peft}")
    assert run(config, []) == 0
    whole = Path(config.run_dir)
    assert coefficients(whole) == pytest.approx([0.0, 0.75, 1.0, 1.0]), "none before an entropy is known; at most 1"
    assert EntropyCoefficient.value_in(whole / "FINAL") == 1.0
    halved = stopped(copied(whole, tmp_path / "copy"))
    assert resume(halved) == 0
    assert coefficients(halved) == coefficients(whole)
    before, after = (load_file(directory / "FINAL" / "model.safetensors") for directory in (whole, halved))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_coefficient_that_is_typed_anew_counts_from_there_on() -> None:
    saved = EntropyCoefficient(0.5)
    saved.value, saved.entropy = 0.75, 1.5
    same, typed = EntropyCoefficient(0.5), EntropyCoefficient(0.1)
    for hook in (same, typed):
        hook.load_state_dict(saved.state_dict())
    assert (same.applied(2.0), typed.applied(2.0), same.applied(1.0)) == (0.75, 0.1, 0.0)
    assert EntropyCoefficient(0.5).applied(2.0) == 0.0
