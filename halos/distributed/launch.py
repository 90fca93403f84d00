"""The Accelerator of a rank, checked against what the launcher was asked for; and checks that all ranks agree."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object

from halos.distributed.deepspeed_config import bfloat16_requested, check_config, deepspeed_requested
from halos.distributed.device import (
    has_bfloat16,
    is_accelerate_launch,
    launcher_settings,
    parent_command,
    prepare_torch,
    requested_precision,
    uses_gpu,
)
from halos.distributed.environment import refuse_partial_launch, world_size
from halos.distributed.rendezvous import form_process_group
from halos.errors import UserError

UNSUPPORTED = {  # the variable that accelerate's launcher sets: the setting's name, the remedy
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "use launch/accelerate/fsdp2.yaml"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism_config", "use launch/accelerate/fsdp2.yaml"),
    "ACCELERATE_DYNAMO_BACKEND": ("torch.compile (dynamo_config)", "leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing", "leave it out and pass train.activation_checkpointing=true"
    ),
}  # fmt: skip


def make_accelerator(precision: str, dtype: str = "auto", *, deterministic: bool = False) -> Accelerator:
    """Create this rank's Accelerator. Raises UserError if it is not what the launcher was asked for, or not supported.

    `precision` "auto" takes the launcher's setting, else bfloat16 on a GPU that supports it. A `dtype` of bfloat16 for the
    weights implies bfloat16 compute; trained parameters are float32 all the same.
    """
    refuse_partial_launch()
    _refuse_missing_ranks()
    prepare_torch(deterministic=deterministic)
    # transformers would leave a new reward head on the meta device of every rank but 0
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if deepspeed_requested():
        check_config()
    names = {"float32": "no", "bfloat16": "bf16"}
    mixed = names.get(precision) or ("bf16" if dtype == "bfloat16" or bfloat16_requested() else None) or requested_precision()
    if mixed is None:
        mixed = "bf16" if has_bfloat16() else "no"
    form_process_group()
    with _without_accelerates_deepspeed():
        accelerator = Accelerator(
            cpu=not uses_gpu(),
            mixed_precision=mixed,
            kwargs_handlers=[
                # buffers are constants: no collective for them; gradients lie in the buckets that are reduced: no copy of them
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    _refuse_unsupported(accelerator)
    return accelerator


@contextmanager
def _without_accelerates_deepspeed() -> Iterator[None]:
    """Hide DeepSpeed from accelerate, whose engine has bfloat16 weights and pickled checkpoints; `deepspeed.py` has ours."""
    requested = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if requested is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = requested


def _refuse_unsupported(accelerator: Accelerator) -> None:
    launched = world_size()
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, but each sees {accelerator.num_processes}: launch with accelerate or torchrun"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"the accelerate config asks for mixed_precision: {accelerator.mixed_precision}, whose loss scaling is not supported:"
            " write bf16 or no"
        )
    for variable, (setting, remedy) in UNSUPPORTED.items():
        if os.environ.get(variable, "no").lower() not in ("no", "false", "", "0"):
            raise UserError(f"the accelerate config asks for {setting}, which is not supported: {remedy}")
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise UserError(
            f"the accelerate config asks for gradient_accumulation_steps: {steps}: leave it out;"
            " train.batch_size is the size of a whole step, and train.microbatch_size that of its micro-batches"
        )
    if fsdp_requested() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the accelerate config asks for FSDP 1: set fsdp_version: 2 in its fsdp_config")
    if (fsdp_requested() or deepspeed_requested()) and not dist.is_initialized():
        strategy = "DeepSpeed" if deepspeed_requested() else "FSDP"
        raise UserError(
            f"the accelerate config asks for {strategy}, but there is no process group: launch with accelerate or torchrun"
        )


def require_same_on_all_ranks(accelerator: Accelerator, name: str, text: str | None, problem: str | None = None) -> None:
    """Compare `text` over all ranks. Raises UserError on every rank if one has another text, or a `problem`. Every rank calls.

    Ranks on other hosts read other files, and would silently train on them.
    """
    everyone = gather_object([(socket.gethostname(), text, problem)])
    first_host, first_text, first_problem = everyone[0]
    for rank, (host, theirs, problem_there) in enumerate(everyone):
        if problem_there is not None:
            raise UserError(problem_there if problem_there == first_problem else f"rank {rank} on {host}: {problem_there}")
        if theirs != first_text:
            lines = zip_longest((first_text or "").splitlines(), (theirs or "").splitlines(), fillvalue="nothing")
            expected, actual = next(pair for pair in lines if pair[0] != pair[1])
            raise UserError(
                f"the {name} of rank {rank} on {host} is not that of rank 0 on {first_host}: {actual.strip()} instead of"
                f" {expected.strip()}. Every rank needs the same command, and every host the same files"
            )


def fsdp_requested() -> bool:
    """Return whether the launcher's config requests FSDP. Without a GPU accelerate itself ignores this, and trains with DDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _refuse_missing_ranks() -> None:
    """`accelerate launch --cpu --num_processes 2`, and distributed_type MULTI_CPU, silently start one process."""
    if world_size() > 1:
        return
    requested = launcher_settings().num_processes
    if requested is not None and requested > 1:
        raise UserError(
            f"accelerate was asked for {requested} processes and started one, as it does on a CPU unless its config says "
            "distributed_type: MULTI_GPU: use --config_file launch/accelerate/cpu2.yaml"
        )


def launched() -> bool:
    """Return whether a launcher started this process, rather than a shell."""
    return "TORCHELASTIC_RUN_ID" in os.environ or is_accelerate_launch(parent_command())
