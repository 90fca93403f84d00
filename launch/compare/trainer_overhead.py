#!/usr/bin/env python3
"""Measure the overhead of the trainer over a bare PyTorch loop of the same mathematics.

    python launch/compare/trainer_overhead.py MODEL [--loss sft] [--steps 12] [--batch-size 8] [--microbatch-size 4]

One process, one model, one optimizer: the two alternate over the same batches, so that both suffer equally from other load. The
bare loop gets packed sequences; it runs the model, sums the loss over the global batch, clips, steps, and reads the loss. The
trainer also splits batches, packs, keeps metrics, writes metrics.jsonl and calls hooks.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hydra
import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from halos.config import validate
from halos.distributed.launch import make_accelerator
from halos.run.assemble import assemble
from halos.trainers.base import Trainer

ROOT = Path(__file__).resolve().parents[2]


def assembled(given: argparse.Namespace, place: str) -> Trainer:
    words = [f"loss={given.loss}", "data=arithmetic", f"model.name_or_path={given.model}", "data.eval=[]", "exp_name=x",
             f"train.batch_size={given.batch_size}", f"train.microbatch_size={given.microbatch_size}", f"run_dir={place}/x",
             f"train.steps={10 * given.steps}", "checkpoint.every=null", "train.precision=float32", "model.dtype=float32",
             "reference.cache=never",
             ]  # fmt: skip
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        config = validate.check(hydra.compose("config", words), words)
    trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
    assert trainer is not None
    for hook in trainer.run.hooks.values():
        hook.on_start(trainer.run)
    return trainer


def packed(trainer: Trainer, indices: np.ndarray) -> tuple[list[Any], int]:
    """Return micro-batches, and the denominator of the loss."""
    size = trainer.settings.microbatch_size
    groups = [[trainer.train.rows[int(i)] for i in indices[start : start + size]] for start in range(0, len(indices), size)]
    denominators = trainer._denominators(trainer.train, indices)
    return [(trainer.packed(trainer.rows(items)), items) for items in groups], denominators[
        "token" if trainer.loss.name == "sft" else "item"
    ]


def bare_step(trainer: Trainer, batches: list[Any], count: int) -> float:
    """Make the same step by hand."""
    module, optimizer, total = trainer.run.module, trainer.run.optimizer, 0.0
    module.train()
    for batch, items in batches:
        arguments = [trainer.loss.inputs.of(module(batch), items)]
        if trainer.loss.needs_reference:
            with torch.no_grad():
                arguments.append(trainer.loss.inputs.of(trainer._refer(batch), items))
        loss = trainer.loss.function(*arguments).values.sum() / count
        loss.backward()
        total += loss.item()
    clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory or a hub id")
    parser.add_argument("--loss", choices=["sft", "dpo"], default="sft")
    parser.add_argument("--steps", type=int, default=12, help="of each kind (default: 12, after one that warms up)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--microbatch-size", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        trainer = assembled(given, place)
        bare, ours = [], []
        for number in range(given.steps + 1):
            indices = trainer.order.batch(number)
            batches, count = packed(trainer, indices)
            began = time.perf_counter()
            bare_step(trainer, batches, count)
            bare.append(time.perf_counter() - began)
            began = time.perf_counter()
            trainer._log(trainer.step(indices))
            ours.append(time.perf_counter() - began)
    pairs = [mine / theirs for mine, theirs in zip(ours[1:], bare[1:], strict=True)]
    print(
        f"\n{given.loss} on {given.model}, {given.batch_size} rows per step, {given.microbatch_size} at once, {given.steps} pairs"
    )
    print("| | median step | ratio of medians | median of the pairs' ratios |")
    print("| --- | --- | --- | --- |")
    print(f"| bare loop | {statistics.median(bare[1:]):.3f} s | 1 | 1 |")
    whole = statistics.median(ours[1:]) / statistics.median(bare[1:])
    print(f"| halos | {statistics.median(ours[1:]):.3f} s | {whole:.3f} | {statistics.median(pairs):.3f} |")


if __name__ == "__main__":
    main()
