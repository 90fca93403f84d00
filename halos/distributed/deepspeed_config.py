"""What an accelerate config asks of DeepSpeed: read, checked before anything loads, and put as its engine takes it."""

import logging
import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from accelerate.utils import DeepSpeedPlugin

from halos.distributed.device import uses_gpu
from halos.errors import UserError

STAGES = (1, 2, 3)
INSTEAD = "or use launch/accelerate/fsdp2.yaml, which shards the same"
TAKEN = {"zero_optimization", "communication_data_type", "communication_data_type_sp", "steps_per_print", "wall_clock_breakdown",
         "memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "zero_allow_untested_optimizer",
         "zero_force_ds_cpu_optimizer"}  # fmt: skip
OURS = {  # what of a DeepSpeed config another key decides, and the one value besides auto that says nothing else
    "optimizer": ("optim=", None),
    "scheduler": ("schedule=", None),
    "train_batch_size": ("train.batch_size", None),
    "train_micro_batch_size_per_gpu": ("train.microbatch_size", None),
    "gradient_accumulation_steps": ("train.batch_size and train.microbatch_size", 1),
    "activation_checkpointing": ("train.activation_checkpointing", None),
    "torch_autocast": ("train.precision", None),
}
OTHERWISE = {  # of zero_optimization: what would share parameters out in a way that is not read here, or round them
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "compute_grad_norm": True,
}


def deepspeed_asked() -> bool:
    """Whether the launcher's config says DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def stage_asked() -> int:
    """Of the launcher's config, which `check_config` has passed."""
    return _given()["zero_optimization"]["stage"]


def bfloat16_asked() -> bool:
    return deepspeed_asked() and _on(_given().get("bf16"))


def check_config() -> None:
    """Raises UserError where the launcher's DeepSpeed config cannot be had, is wrong, or says what is said elsewhere."""
    if find_spec("deepspeed") is None:
        raise UserError(f"the accelerate config asks for DeepSpeed, which is not installed: pip install deepspeed, {INSTEAD}")
    try:
        given = _given()
    except (ValueError, OSError, AttributeError, TypeError) as error:  # of a file that is no object, accelerate asks for its keys
        raise UserError(f"the accelerate config's DeepSpeed part could not be read: {' '.join(str(error).split())}") from error
    for name in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(given.get(name) or {}, dict):
            raise UserError(
                f"the DeepSpeed config says {name}: {given[name]!r}: it must be an object, as in DeepSpeed's documentation"
            )
    stages = given.get("zero_optimization") or {}
    if type(stage := stages.get("stage")) is not int or stage not in STAGES:
        raise UserError(f"the DeepSpeed config asks for ZeRO stage {stage!r}: there are the numbers 1, 2 and 3, {INSTEAD}")
    if _on(given.get("fp16")):
        raise UserError("the DeepSpeed config asks for fp16, whose loss scaling is not supported: write bf16")
    for name, value in given.items():
        key, nothing = OURS.get(name, (None, None))
        if key is not None and value not in ("auto", nothing):
            raise UserError(f"the DeepSpeed config says {name}: {value!r}: leave it out; {key} decides")
        if name not in {*TAKEN, *OURS, "fp16", "bf16", "gradient_clipping"}:
            raise UserError(f"the DeepSpeed config says {name}, which is not passed on: leave it out")
    for name, value in OTHERWISE.items():
        if stages.get(name, value) not in ("auto", value):
            raise UserError(f"the DeepSpeed config says {name}: {stages[name]!r}, which is not supported: leave it out")
    for part in ("offload_optimizer", "offload_param"):
        device = (stages.get(part) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"the DeepSpeed config says {part} to {device}: there are none and cpu")
    try:
        package().DeepSpeedConfig(engine_config(None))
    except Exception as error:  # whatever its parts raise
        raise UserError(f"DeepSpeed does not take its config: {' '.join(str(error).split())}") from error


def refuse_settings(*, max_grad_norm: float | None, trained: str) -> None:
    """Raises UserError where the launcher's config clips gradients otherwise than train.max_grad_norm, or where the parameters
    that are trained would not be float32 (`trained`: a dtype's name, or auto): the engine would make float32 copies of them,
    which no checkpoint has."""
    if not deepspeed_asked():
        return
    clipping = _given().get("gradient_clipping")
    if clipping not in ("auto", None) and clipping != (max_grad_norm or 0.0):
        raise UserError(f"the DeepSpeed config says gradient_clipping: {clipping!r}: leave it out; train.max_grad_norm decides")
    if trained not in ("auto", "float32"):
        raise UserError(
            f"model.dtype={trained} with peft=none: under DeepSpeed what is trained is float32. Leave model.dtype out;"
            " train.precision=bfloat16 computes in bfloat16 all the same"
        )


def _given() -> dict[str, Any]:
    """The launcher's DeepSpeed config, as accelerate reads it from a file or from its own keys."""
    given = DeepSpeedPlugin().deepspeed_config
    assert isinstance(given, dict)
    return given


def _on(part: dict[str, Any] | None) -> bool:
    return str((part or {}).get("enabled", "false")).lower() == "true"


def engine_config(max_grad_norm: float | None) -> dict[str, Any]:
    """What the engine is told. Weights stay float32, and autocast makes bfloat16 of them as under DDP: a step is the same step.
    Stage 3 so shares out 16 bytes a parameter (weight, gradient, two moments), as many as with bfloat16 weights and a copy."""
    kept = {name: value for name, value in _given().items() if name in TAKEN}
    return {
        **kept,
        "train_micro_batch_size_per_gpu": 1,  # the engine only counts with it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def package() -> Any:
    """The package, silent but for warnings; imported here because only these runs need it, and it takes seconds."""
    deepspeed = import_module("deepspeed")  # the user's to install
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    log.addFilter(_says_something_new)
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated")  # it calls torch by older names
    if not uses_gpu():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first; gloo does as well
    return deepspeed


def _says_something_new(record: logging.LogRecord) -> bool:
    """That a step was skipped the loop tells, with its rows."""
    return "Skipping step" not in record.getMessage()
