"""The processes of a run: what the launcher was asked for, and what it gave."""

import os
import re
import subprocess
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from halos.errors import UserError

PATIENCE = timedelta(hours=6)  # one process tokenises, or proves a merge, while the others wait


def accelerator(precision: str, dtype: str = "auto") -> Accelerator:
    """The Accelerator of this process. Raises UserError where the launcher gave something else than was asked for.

    `precision` auto takes what the launcher's config says, and else bfloat16 on a GPU that has it, and wherever the
    weights (`dtype`) were asked for in it: what is trained is float32 all the same.
    """
    cpu = not torch.cuda.is_available()
    _one_process_asked_for_many()
    # transformers would leave a new reward head on the meta device of every process but the first
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    names = {"float32": "no", "bfloat16": "bf16"}
    mixed = names.get(precision) or ("bf16" if dtype == "bfloat16" else None)
    if mixed is None and not cpu and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
        mixed = "bf16" if torch.cuda.is_bf16_supported() else "no"
    made = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # buffers are constants: no collective for them
            InitProcessGroupKwargs(timeout=PATIENCE, backend=None if cpu else "cuda:nccl,cpu:gloo"),
        ],
    )
    _compare(made)
    return made


def _compare(made: Accelerator) -> None:
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != made.num_processes:
        raise UserError(
            f"{asked} processes were launched, but each sees {made.num_processes}: launch with accelerate or torchrun"
        )
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("DeepSpeed is not supported yet: use launch/accelerate/fsdp2.yaml, which shards as ZeRO-3 does")
    if asked_to_shard() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the accelerate config asks for FSDP 1: set fsdp_version: 2 in its fsdp_config")
    if asked_to_shard() and not dist.is_initialized():
        raise UserError("the accelerate config asks for FSDP, but there is no process group: launch with accelerate or torchrun")


def _asked(flag: str) -> bool:
    return os.environ.get(flag, "false").lower() == "true"


def asked_to_shard() -> bool:
    """Whether the launcher's config says FSDP. accelerate itself forgets it where there is no GPU, and trains DDP."""
    return _asked("ACCELERATE_USE_FSDP")


def _one_process_asked_for_many() -> None:
    """`accelerate launch --cpu --num_processes 2`, and distributed_type MULTI_CPU, start one process and say nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    words = _parent_command()
    if not _is_accelerate(words):
        return
    asked = _option(words, "--num_processes") or _option(words, "--num-processes")
    config = _option(words, "--config_file") or _option(words, "--config-file")
    if asked is None and config is not None and Path(config).is_file():
        asked = str((yaml.safe_load(Path(config).read_text()) or {}).get("num_processes", 1))
    if asked is not None and asked.isdigit() and int(asked) > 1:
        raise UserError(
            f"accelerate was asked for {asked} processes and started one, as it does on a CPU unless its config says "
            "distributed_type: MULTI_GPU: use --config_file launch/accelerate/cpu2.yaml"
        )


def launched() -> bool:
    """Whether a launcher started this process, rather than a shell."""
    return "TORCHELASTIC_RUN_ID" in os.environ or _is_accelerate(_parent_command())


def _is_accelerate(words: list[str]) -> bool:
    """`accelerate launch`, or its module by -m or by path."""
    if any(re.search(r"accelerate[./]commands[./]launch", word) for word in words):
        return True
    return "launch" in words and any("accelerate" in word for word in words[: words.index("launch")])


def _parent_command() -> list[str]:
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        shown = subprocess.run(["ps", "-o", "command=", "-p", str(os.getppid())], capture_output=True, text=True, check=False)
        return shown.stdout.split()


def _option(words: list[str], name: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(name + "="):
            return word.partition("=")[2]
    return None
