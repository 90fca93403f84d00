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
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL

from halos.cli.status import FAILED

KILLS = 34  # of each loss: 102 in all
LONGEST = 0.5  # seconds, in which some steps are taken and saved, or a batch is sampled
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

    def start(self, *, kill_at: tuple[int, float] | None = None) -> int:
        """Start or resume, and kill so many seconds after the start was recorded and the metrics of a step written; return the
        exit status."""
        words = [f"resume={self.run}"] if (self.run / "config.yaml").is_file() else [*self.new, "overwrite=true"]
        starts = self.starts
        with self.output.open("w") as output:
            process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], stdout=output, stderr=output,
                                       start_new_session=True)  # fmt: skip
            if kill_at is not None:
                while process.poll() is None and (self.starts == starts or self.step < kill_at[0]):
                    time.sleep(0.01)
                time.sleep(kill_at[1])
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            return process.wait()

    @property
    def starts(self) -> int:
        return len([*(self.run / "attempts").glob("[0-9]*")])

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl; -1 before the first line."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        whole = [line for line in lines if line.endswith("}")]
        return int(json.loads(whole[-1])["step"]) if whole else -1

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
    assert whole.start() == 0, whole.output.read_text()
    generator, kills, chains = random.Random(loss), 0, 0
    while kills < KILLS:
        started, status, chains = LiveRun(tmp_path_factory.mktemp("cut"), cache, LOSSES[loss]), FAILED, chains + 1
        while status != 0:
            # most within a few steps of where it died last, so that a run of 16 steps dies several times
            step = started.step + generator.choice((0, 1, 1, 2, 3, 5))
            status = started.start(kill_at=(step, generator.uniform(0, LONGEST)) if kills < KILLS else None)
            assert status in (0, -signal.SIGKILL), started.output.read_text()
            kills += status != 0
        assert started.story() == whole.story(), f"chain {chains}, {kills} kills"
    assert {line["step"] for line in whole.story()["metrics"]} == set(range(17))
    record_property("kills", kills)
    record_property("chains", chains)
