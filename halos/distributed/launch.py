"""The processes of a run: what the launcher was asked for, and what it gave."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object

from halos.distributed.deepspeed_config import bfloat16_asked, check_config, deepspeed_asked
from halos.distributed.device import (
    has_bfloat16,
    is_accelerate,
    launcher_settings,
    parent_command,
    precision_asked,
    prepare_torch,
    uses_gpu,
)
from halos.distributed.environment import refuse_half_launched, world_size
from halos.distributed.rendezvous import meet
from halos.errors import UserError

UNSUPPORTED = {  # what an accelerate config may ask for besides: the variable its launcher sets, the words, the remedy
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "use launch/accelerate/fsdp2.yaml"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism_config", "use launch/accelerate/fsdp2.yaml"),
    "ACCELERATE_DYNAMO_BACKEND": ("torch.compile (dynamo_config)", "leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing", "leave it out and type train.activation_checkpointing=true"
    ),
}  # fmt: skip


def accelerator(precision: str, dtype: str = "auto", *, deterministic: bool = False) -> Accelerator:
    """The Accelerator of this process. Raises UserError where the launcher gave something else than was asked for.

    `precision` auto takes what the launcher's config says, and else bfloat16 on a GPU that has it, and wherever the
    weights (`dtype`) were asked for in it: what is trained is float32 all the same.
    """
    refuse_half_launched()
    _one_process_asked_for_many()
    prepare_torch(deterministic=deterministic)
    # transformers would leave a new reward head on the meta device of every process but the first
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if deepspeed_asked():
        check_config()
    names = {"float32": "no", "bfloat16": "bf16"}
    mixed = names.get(precision) or ("bf16" if dtype == "bfloat16" or bfloat16_asked() else None) or precision_asked()
    if mixed is None:
        mixed = "bf16" if has_bfloat16() else "no"
    meet()
    with _deepspeed_is_ours():
        made = Accelerator(
            cpu=not uses_gpu(),
            mixed_precision=mixed,
            kwargs_handlers=[
                # buffers are constants: no collective for them; gradients lie in the buckets that are reduced: no copy of them
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    _compare(made)
    return made


@contextmanager
def _deepspeed_is_ours() -> Iterator[None]:
    """accelerate would make its own engine, whose weights are bfloat16 and whose checkpoints are pickled."""
    asked = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = asked


def _compare(made: Accelerator) -> None:
    asked = world_size()
    if asked != made.num_processes:
        raise UserError(
            f"{asked} processes were launched, but each sees {made.num_processes}: launch with accelerate or torchrun"
        )
    if made.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"the accelerate config asks for mixed_precision: {made.mixed_precision}, whose loss scaling is not supported:"
            " write bf16 or no"
        )
    for flag, (what, remedy) in UNSUPPORTED.items():
        if os.environ.get(flag, "no").lower() not in ("no", "false", "", "0"):
            raise UserError(f"the accelerate config asks for {what}, which is not supported: {remedy}")
    if made.gradient_accumulation_steps != 1:
        raise UserError(
            f"the accelerate config asks for gradient_accumulation_steps: {made.gradient_accumulation_steps}: leave it out;"
            " train.batch_size counts a whole step, and train.microbatch_size says how it is cut up"
        )
    if asked_to_shard() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the accelerate config asks for FSDP 1: set fsdp_version: 2 in its fsdp_config")
    if (asked_to_shard() or deepspeed_asked()) and not dist.is_initialized():
        what = "DeepSpeed" if deepspeed_asked() else "FSDP"
        raise UserError(
            f"the accelerate config asks for {what}, but there is no process group: launch with accelerate or torchrun"
        )


def agree(made: Accelerator, what: str, mine: str | None, problem: str | None = None) -> None:
    """All processes come together over `what`, which is text. Raises UserError in each where one has a problem or other text.

    Processes on other hosts read other files, and would train on with them without a word.
    """
    everyone = gather_object([(socket.gethostname(), mine, problem)])
    home, text, trouble = everyone[0]
    for rank, (host, theirs, complaint) in enumerate(everyone):
        if complaint is not None:
            raise UserError(complaint if complaint == trouble else f"process {rank} on {host}: {complaint}")
        if theirs != text:
            pairs = zip_longest((text or "").splitlines(), (theirs or "").splitlines(), fillvalue="nothing")
            one, other = next(pair for pair in pairs if pair[0] != pair[1])
            raise UserError(
                f"the {what} of process {rank} on {host} is not that of process 0 on {home}: {other.strip()} instead of"
                f" {one.strip()}. Every process needs the same command, and every host the same files"
            )


def _asked(flag: str) -> bool:
    return os.environ.get(flag, "false").lower() == "true"


def asked_to_shard() -> bool:
    """Whether the launcher's config says FSDP. accelerate itself forgets it where there is no GPU, and trains DDP."""
    return _asked("ACCELERATE_USE_FSDP")


def _one_process_asked_for_many() -> None:
    """`accelerate launch --cpu --num_processes 2`, and distributed_type MULTI_CPU, start one process and say nothing."""
    if world_size() > 1:
        return
    asked = launcher_settings().num_processes
    if asked is not None and asked > 1:
        raise UserError(
            f"accelerate was asked for {asked} processes and started one, as it does on a CPU unless its config says "
            "distributed_type: MULTI_GPU: use --config_file launch/accelerate/cpu2.yaml"
        )


def launched() -> bool:
    """Whether a launcher started this process, rather than a shell."""
    return "TORCHELASTIC_RUN_ID" in os.environ or is_accelerate(parent_command())
