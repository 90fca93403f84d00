"""The Accelerator of a rank, checked against what the launcher was asked for."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

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
from halos.distributed.strategies import requested_strategy
from halos.distributed.strategy import Strategy
from halos.errors import UserError

OFF = ("no", "false", "", "0")
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
    strategy = requested_strategy()
    strategy.check_launch()
    names = {"float32": "no", "bfloat16": "bf16"}
    half = dtype == "bfloat16" or strategy.requests_bfloat16()
    mixed = names.get(precision) or ("bf16" if half else None) or requested_precision()
    if mixed is None:
        mixed = "bf16" if has_bfloat16() else "no"
    form_process_group()
    if AcceleratorState._shared_state.get("_mixed_precision") not in (None, mixed):
        AcceleratorState._reset_state()  # of an earlier run in this process
    with _hidden(strategy.hidden_from_accelerate):
        accelerator = Accelerator(
            cpu=not uses_gpu(),
            mixed_precision=mixed,
            kwargs_handlers=[
                # buffers are constants: no collective for them; gradients lie in the buckets that are reduced: no copy of them
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    _refuse_unsupported(accelerator, strategy)
    return accelerator


@contextmanager
def _hidden(variables: Sequence[str]) -> Iterator[None]:
    """Without these variables of the launcher, which accelerate would act on."""
    values = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


def _refuse_unsupported(accelerator: Accelerator, strategy: type[Strategy]) -> None:
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
        if variable not in strategy.hidden_from_accelerate and os.environ.get(variable, "no").lower() not in OFF:
            raise UserError(f"the accelerate config asks for {setting}, which is not supported: {remedy}")
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise UserError(
            f"the accelerate config asks for gradient_accumulation_steps: {steps}: leave it out;"
            " train.batch_size is the size of a whole step, and train.microbatch_tokens that of its micro-batches"
        )
    if strategy.needs_process_group and not dist.is_initialized():
        raise UserError(
            f"the accelerate config asks for {strategy.launched_as}, but there is no process group: launch with accelerate or"
            " torchrun"
        )


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
