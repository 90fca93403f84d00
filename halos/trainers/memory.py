"""How much memory a process has needed, and what to do where there was too little."""

import resource
import sys

import torch

from halos.config.schema import Config

REFUSALS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")  # of allocators, on CPUs too


def peak_mb(device: torch.device) -> float:
    """Peak memory of this process so far in MiB: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)  # bytes on macOS, KiB elsewhere


def ran_out(error: BaseException) -> bool:
    """Whether this is an allocator that had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in REFUSALS)


def remedies(config: Config) -> str:
    """The keys that would have this run take less memory, those first that change no result."""
    found, train = [], config.train
    if train.microbatch_size > 1:
        found.append(f"train.microbatch_size={max(1, train.microbatch_size // 2)} (it changes no result)")
    if not train.activation_checkpointing:
        found.append("train.activation_checkpointing=true (nor does this, for more time)")
    if config.peft.name == "none":
        found.append("peft=lora")
    elif config.model.dtype in ("auto", "float32"):
        found.append("model.dtype=bfloat16, of the frozen base")
    found.append(f"train.max_length below {train.max_length}")
    if config.online is not None:
        found.append("online.sampler.batch_size and online.sampler.cache_tokens")
    return "; ".join([*found, "or more processes that share the model, launch/accelerate/fsdp2.yaml"])
