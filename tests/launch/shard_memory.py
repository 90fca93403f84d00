"""Measure how far each rank's memory rises while a sharded model is saved: shard_memory.py OUTPUT, on every rank."""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from halos.checkpoint import weights
from halos.distributed.children import exit_process
from halos.distributed.launch import make_accelerator
from halos.distributed.strategies import requested_strategy
from halos.logps.model import LanguageModel

SIZES = {"vocab_size": 8000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12}


def rise(act: Callable[[], Any]) -> int:
    """Bytes by which the peak of this process's resident memory is above what it is now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = resident("VmRSS")
    kept = act()
    del kept
    return resident("VmHWM") - before


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    made = make_accelerator("float32")
    strategy = requested_strategy()(made)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    module, _ = strategy.wrap(LanguageModel(model), lambda held: torch.optim.SGD(held.parameters(), lr=0.1), max_grad_norm=None)
    output = Path(sys.argv[1])
    place = Path(tempfile.mkdtemp(dir=output)) if made.is_main_process else output
    box = [str(place)]
    dist.broadcast_object_list(box)
    place, rank = Path(box[0]), made.process_index

    def save() -> Any:
        shards = strategy.shards(module)
        weights.save_shards(place, model, shards, None, main=made.is_main_process)
        return shards

    facts = {"whole": whole, "largest": largest, "world": made.num_processes, "sharded": rise(save)}
    facts["gathered"] = rise(lambda: strategy.gathered(module, trained_only=False))
    (output / f"{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    os.sync()
    exit_process(0)


main()
