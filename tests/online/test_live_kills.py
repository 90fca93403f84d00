"""A live loop that is killed at any moment, between and within its batches, ends as one that was never killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL

from halos.cli.status import FAILED

KILLS = 34  # of each loss: 102 in all
LIVE = [
    "loss=online", "online.steps=4", "online.minibatches=2", "online.epochs=2", "online.samples_per_prompt=3",
    "online.sampler.max_new_tokens=8", "online.scorer.functions=[{function: length, target: 3}]", "optim.lr=1e-2",
    "online.eval_prompts=4", "train.eval_every=5", "checkpoint.every=1",
]  # fmt: skip
LOSSES = {  # values and an adaptive coefficient of a batch; batches that are refilled; pairs
    "ppo": ["online.loss=ppo", "peft=lora", "train.batch_size=6", "online.overrides=[loss.kl_target=0.1,loss.kl_horizon=10]"],
    "grpo": ["online.loss=grpo", "train.batch_size=6", "online.feedback.drop_equal=true"],
    "dpo": ["online.loss=dpo", "train.batch_size=2"],
}


class LiveRun:
    """train.py in a process of its own, started and resumed."""

    def __init__(self, directory: Path, cache: Path, words: list[str]) -> None:
        self.run = directory / "run"
        self.new = [*SMALL, *LIVE, *words, f"cache_dir={cache}", f"output_root={directory}", "exp_name=run"]
        self.output = directory / "output.txt"

    def start(self, *, kill_after: float | None = None) -> int:
        """Start or resume, and kill after so many seconds; return the exit status."""
        words = [f"resume={self.run}"] if (self.run / "config.yaml").is_file() else [*self.new, "overwrite=true"]
        with self.output.open("w") as output:
            process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], stdout=output, stderr=output,
                                       start_new_session=True)  # fmt: skip
            try:
                return process.wait(kill_after)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return process.wait()

    def story(self) -> dict[str, Any]:
        """What a run leaves, but for times and memory."""
        timed = ("second", "memory", "throughput", "mfu", "tokens_per")
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        metrics = [{name: value for name, value in line.items() if not any(word in name for word in timed)} for line in lines]
        files = [path for name in ("FINAL", "rollouts") for path in sorted((self.run / name).rglob("*")) if path.is_file()]
        weights = {str(path.relative_to(self.run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
                   if path.suffix in (".safetensors", ".gz")}  # fmt: skip
        return {"metrics": metrics, **weights}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_live_loop_killed_at_any_moment_ends_as_one_that_was_not(
    loss: str, cache: Path, tmp_path_factory: pytest.TempPathFactory, record_property: Callable[[str, Any], None]
) -> None:
    whole = LiveRun(tmp_path_factory.mktemp("whole"), cache, LOSSES[loss])
    assert whole.start() == 0, whole.output.read_text()  # fills the caches, so that the next one is as long as the others
    began = time.monotonic()
    again = LiveRun(tmp_path_factory.mktemp("again"), cache, LOSSES[loss])
    assert again.start() == 0
    seconds, generator, kills, chains = time.monotonic() - began, random.Random(loss), 0, 0
    assert again.story() == whole.story()
    while kills < KILLS:
        started, status, chains = LiveRun(tmp_path_factory.mktemp("cut"), cache, LOSSES[loss]), FAILED, chains + 1
        while status != 0:
            # imports take the first half; of a run that was killed near its end less is left
            status = started.start(kill_after=seconds * generator.uniform(0.4, 1.0) if kills < KILLS else None)
            assert status in (0, -signal.SIGKILL), started.output.read_text()
            kills += status != 0
        assert started.story() == whole.story(), f"chain {chains}, {kills} kills"
    steps = {line["step"] for line in whole.story()["metrics"]}
    assert steps == set(range(17))
    record_property("kills", kills)
    record_property("chains", chains)
