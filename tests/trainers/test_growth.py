"""A long run holds no more memory than a short one: neither tensors nor pages grow with the steps, nor what Python keeps."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from halos.hooks.base import Hook, Run
from halos.run.lifecycle import run

STEPS, EVERY = 600, 100
KEPT = [("loss=dpo", "peft=lora"), ("loss=kto",), ("loss=grpo",)]


class Watch(Hook):
    """Writes down what is alive after every 100th step."""

    def on_step(self, run: Run, row: dict[str, Any]) -> None:
        if run.step % EVERY:
            return
        gc.collect()
        alive = gc.get_objects()
        tensors = sum(isinstance(each, torch.Tensor) for each in alive if type(each).__module__.startswith("torch"))
        held = {"tensors": tensors, "objects": len(alive), "mib": psutil.Process().memory_info().rss / 2**20}
        with (run.directory.path / "held.jsonl").open("a") as file:
            file.write(json.dumps(held) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("words", KEPT, ids=" ".join)
def test_five_hundred_steps_hold_no_more_than_the_first_hundred(
    words: tuple[str, ...], configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    hook = "+hooks.watch._target_=test_growth.Watch"
    settings = ["train.batch_size=4", f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=100", "checkpoint.every=200"]
    assert run(configure(*words, hook, "plugins=[test_growth]", *settings), []) == 0
    held = [json.loads(line) for line in (tmp_path / "run" / "held.jsonl").read_text().splitlines()]
    assert len(held) == STEPS // EVERY
    first, last = held[0], held[-1]
    assert last["tensors"] <= first["tensors"], held
    assert last["objects"] - first["objects"] < STEPS - EVERY, f"something is kept of every step: {held}"
    assert last["mib"] - first["mib"] < 8, held
