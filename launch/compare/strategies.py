#!/usr/bin/env python3
"""Compare DDP, FSDP2 and DeepSpeed with one process: tokens per second, and memory of each rank by model size.

    python launch/compare/strategies.py memory [--sizes 25 100 200] [--world 2]
    python launch/compare/strategies.py speed MODEL [--steps 8]

Everything runs on this machine's CPU over gloo. Memory is each rank's peak resident memory beyond that after its imports, during
steps and, separately, during the start; models are Llamas with random weights. Speed is measured for one process on one thread,
one on all cores, and one process of one thread per core.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
DDP: dict[str, str] = {}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
MIB = 2**20


def resident(field: str) -> float:
    """Return VmRSS or VmHWM of this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / MIB


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def build(place: Path, millions: int) -> Path:
    """Build a Llama of about the given number of parameters, with the tokenizer of model=tiny."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from halos.models import tiny

    tiny.build(place)
    width = 64 * round((millions * 1e6 / 12 / 12) ** 0.5 / 64)
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3 // 8 * 8, "num_hidden_layers": 12, "head_dim": 64}
    config = LlamaConfig.from_pretrained(place, num_attention_heads=width // 64, num_key_value_heads=width // 64, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def act(model: str, output: Path, words: list[str], steps: int) -> None:
    """Run one rank: train a few steps, and record time and memory."""
    import hydra
    import torch.distributed as dist

    from halos.config import validate
    from halos.distributed.launch import make_accelerator
    from halos.run.assemble import assemble

    typed = ["data=arithmetic", f"model.name_or_path={model}", "data.eval=[]", "exp_name=run", "checkpoint.every=null",
             f"run_dir={output}/run", f"train.steps={steps + 1}", "train.eval_at_start=false", *words]  # fmt: skip
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        config = validate.check(hydra.compose("config", typed), typed)
    accelerator = make_accelerator(config.train.precision, config.model.dtype)
    before = resident("VmRSS")
    trainer = assemble(config, [], accelerator)
    assert trainer is not None
    started = resident("VmHWM") - before
    trainer.step(trainer.order.batch(0))
    reset_peak()
    tokens, began = trainer.run.tokens, time.perf_counter()
    for number in range(1, steps + 1):
        trainer.step(trainer.order.batch(number))
    seconds = time.perf_counter() - began
    numbers = {
        "start": started, "steps": resident("VmHWM") - before, "tokens_per_second": (trainer.run.tokens - tokens) / seconds,
        "parameters": sum(p.numel() for p in trainer.run.module.parameters()),
    }  # fmt: skip
    (output / f"rank{accelerator.process_index}.json").write_text(json.dumps(numbers))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def measured(model: str, words: list[str], *, world: int, how: dict[str, str], threads: int, steps: int) -> list[dict[str, Any]]:
    """Return the records of all ranks."""
    with tempfile.TemporaryDirectory() as output:
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **how}
        command = [sys.executable, *many, __file__, "act", model, output, str(steps), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            sys.exit(f"{command} failed:\n{done.stderr[-3000:]}")
        return [json.loads((Path(output) / f"rank{rank}.json").read_text()) for rank in range(world)]


def memory(sizes: list[int], world: int) -> None:
    print(f"peak MiB of each of {world} ranks beyond its imports; full fine-tuning in float32 with AdamW, one row per rank\n")
    ways = {"FSDP2": FSDP2, **({"ZeRO-3": ZERO3} if find_spec("deepspeed") else {})}
    heads = [f"{name}, in steps | over DDP | {name} at the start: rank 0, others" for name in ways]
    print(f"| parameters | weights, MiB | DDP, in steps | {' | '.join(heads)} |")
    print("| --- | --- | --- |" + " --- | --- | --- |" * len(ways))
    words = ["loss=sft", f"train.batch_size={world}", "train.microbatch_size=1", "model.dtype=float32", "train.precision=float32"]
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            model = str(build(Path(place) / "model", size))
            ddp, *others = (measured(model, words, world=world, how=how, threads=1, steps=3) for how in (DDP, *ways.values()))
        count, most = ddp[0]["parameters"], max(rank["steps"] for rank in ddp)
        facts = [f"{count / 1e6:.0f} M", f"{count * 4 / MIB:.0f}", f"{most:.0f}"]
        for ranks in others:
            peak = max(rank["steps"] for rank in ranks)
            start = f"{ranks[0]['start']:.0f}, {max(rank['start'] for rank in ranks[1:]):.0f}"
            facts += [f"{peak:.0f}", f"{peak / most:.2f}", start]
        print(f"| {' | '.join(facts)} |", flush=True)


def speed(model: str, steps: int) -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"tokens per second on {cores} cores, batches of 8 rows, 4 at a time\n")
    print("| run | one process, 1 thread | one process, all cores | DDP | FSDP2 | DDP / one on all cores |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, own in (("sft, full", ["loss=sft"]), ("dpo, LoRA", ["loss=dpo", "peft=lora"])):
        words = [*own, "train.batch_size=8", "train.microbatch_size=4", "model.dtype=float32", "train.precision=float32"]
        places = [(1, DDP, 1), (1, DDP, cores), (cores, DDP, 1), (cores, FSDP2, 1)]
        rates = []
        for world, how, threads in places:
            ranks = measured(model, words, world=world, how=how, threads=threads, steps=steps)
            rates.append(statistics.mean(rank["tokens_per_second"] for rank in ranks))
        print(f"| {name} | " + " | ".join(f"{rate:.0f}" for rate in rates) + f" | {rates[2] / rates[1]:.2f} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["act"]:
        model, output, steps, *words = sys.argv[2:]
        act(model, Path(output), words, int(steps))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("memory")
    asked.add_argument("--sizes", type=int, nargs="+", default=[25, 100, 200], help="millions of parameters")
    asked.add_argument("--world", type=int, default=2)
    asked = commands.add_parser("speed")
    asked.add_argument("model", help="a directory or a hub id")
    asked.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    memory(given.sizes, given.world) if given.command == "memory" else speed(given.model, given.steps)


if __name__ == "__main__":
    main()
