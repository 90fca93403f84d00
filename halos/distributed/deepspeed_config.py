"""Read the DeepSpeed part of an accelerate config, check it before anything loads, and translate it for DeepSpeed's engine."""

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
PASSED_ON = {"zero_optimization", "communication_data_type", "communication_data_type_sp", "steps_per_print",
             "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
             "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"}  # fmt: skip
DECIDED_ELSEWHERE = {  # settings that a key of ours decides, and the one value besides auto that does not contradict it
    "optimizer": ("optim=", None),
    "scheduler": ("schedule=", None),
    "train_batch_size": ("train.batch_size", None),
    "train_micro_batch_size_per_gpu": ("train.microbatch_tokens", None),
    "gradient_accumulation_steps": ("train.batch_size and train.microbatch_tokens", 1),
    "activation_checkpointing": ("train.activation_checkpointing", None),
    "torch_autocast": ("train.precision", None),
}
UNSUPPORTED = {  # in zero_optimization, with the value that is: others shard parameters in another way, or round them
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "compute_grad_norm": True,
}


def deepspeed_requested() -> bool:
    """Return whether the launcher's config requests DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def zero_stage() -> int | None:
    """Return the ZeRO stage of the launcher's config; None of one that `check_config` refuses."""
    try:
        return _launcher_config()["zero_optimization"]["stage"]
    except (ValueError, OSError, AttributeError, TypeError, KeyError):
        return None


def bfloat16_requested() -> bool:
    """Return whether the launcher's DeepSpeed config enables bf16."""
    return deepspeed_requested() and _enabled(_launcher_config().get("bf16"))


def check_config() -> None:
    """Raises UserError if DeepSpeed is not installed, or its config is unreadable, wrong or contradicts other keys."""
    if find_spec("deepspeed") is None:
        raise UserError(f"the accelerate config asks for DeepSpeed, which is not installed: pip install deepspeed, {INSTEAD}")
    try:
        config = _launcher_config()
    except (ValueError, OSError, AttributeError, TypeError) as error:  # accelerate takes the keys of any JSON
        raise UserError(f"the accelerate config's DeepSpeed part could not be read: {' '.join(str(error).split())}") from error
    for name in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(config.get(name) or {}, dict):
            raise UserError(
                f"the DeepSpeed config says {name}: {config[name]!r}: it must be an object, as in DeepSpeed's documentation"
            )
    zero = config.get("zero_optimization") or {}
    if type(stage := zero.get("stage")) is not int or stage not in STAGES:
        raise UserError(f"the DeepSpeed config asks for ZeRO stage {stage!r}: there are the numbers 1, 2 and 3, {INSTEAD}")
    if _enabled(config.get("fp16")):
        raise UserError("the DeepSpeed config asks for fp16, whose loss scaling is not supported: write bf16")
    for name, value in config.items():
        key, neutral = DECIDED_ELSEWHERE.get(name, (None, None))
        if key is not None and value not in ("auto", neutral):
            raise UserError(f"the DeepSpeed config says {name}: {value!r}: leave it out; {key} decides")
        if name not in {*PASSED_ON, *DECIDED_ELSEWHERE, "fp16", "bf16", "gradient_clipping"}:
            raise UserError(f"the DeepSpeed config says {name}, which is not passed on: leave it out")
    for name, value in UNSUPPORTED.items():
        if zero.get(name, value) not in ("auto", value):
            raise UserError(f"the DeepSpeed config says {name}: {zero[name]!r}, which is not supported: leave it out")
    for part in ("offload_optimizer", "offload_param"):
        device = (zero.get(part) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"the DeepSpeed config says {part} to {device}: there are none and cpu")
    try:
        package().DeepSpeedConfig(engine_config(None))
    except Exception as error:  # its parts raise all kinds
        raise UserError(f"DeepSpeed does not take its config: {' '.join(str(error).split())}") from error


def refuse_settings(*, max_grad_norm: float | None, trained: str) -> None:
    """Raises UserError if the launcher's config contradicts train.max_grad_norm, or if the trained parameters would not be
    float32 (`trained`: a dtype's name, or auto): DeepSpeed would keep float32 copies of them, which no checkpoint has."""
    if not deepspeed_requested():
        return
    clipping = _launcher_config().get("gradient_clipping")
    if clipping not in ("auto", None) and clipping != (max_grad_norm or 0.0):
        raise UserError(f"the DeepSpeed config says gradient_clipping: {clipping!r}: leave it out; train.max_grad_norm decides")
    if trained not in ("auto", "float32"):
        raise UserError(
            f"model.dtype={trained} with peft=none: under DeepSpeed trained parameters are float32. Leave model.dtype out;"
            " train.precision=bfloat16 computes in bfloat16 all the same"
        )


def _launcher_config() -> dict[str, Any]:
    """Return the launcher's DeepSpeed config, as accelerate reads it from a file or from its own keys."""
    config = DeepSpeedPlugin().deepspeed_config
    assert isinstance(config, dict)
    return config


def _enabled(part: dict[str, Any] | None) -> bool:
    return str((part or {}).get("enabled", "false")).lower() == "true"


def engine_config(max_grad_norm: float | None) -> dict[str, Any]:
    """Return the config for DeepSpeed's engine. Weights stay float32 and autocast computes in bfloat16, so that a step equals a
    step of DDP. Stage 3 then shards 16 bytes per parameter (weight, gradient, two moments), as many as with bfloat16 weights
    and a float32 copy."""
    passed_on = {name: value for name, value in _launcher_config().items() if name in PASSED_ON}
    return {
        **passed_on,
        "train_micro_batch_size_per_gpu": 1,  # the engine only counts samples with it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def package() -> Any:
    """Import deepspeed, with only its warnings logged. Here, because only these runs need it and the import takes seconds."""
    deepspeed = import_module("deepspeed")  # an optional dependency
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    log.addFilter(_is_no_skipped_step)
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated")  # it calls torch by older names
    if not uses_gpu():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would have to be compiled; gloo serves
    return deepspeed


def _is_no_skipped_step(record: logging.LogRecord) -> bool:
    """Drop DeepSpeed's line about a skipped step: the trainer logs it with the batch's rows."""
    return "Skipping step" not in record.getMessage()
