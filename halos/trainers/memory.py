"""Peak memory of a process, and remedies when memory runs out."""

import resource
import sys

import torch

from halos.config.schema import Config

MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")  # of allocators, on CPUs too


TRIED = 2048  # tokens of the largest micro-batch that is tried where train.microbatch_tokens=auto


def peak_mb(device: torch.device) -> float:
    """Peak memory of this process so far in MiB: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)  # bytes on macOS, KiB elsewhere


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocator had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in MESSAGES)


def remedies(config: Config, budget: int | None = None, *, checkpointed: bool | None = None) -> str:
    """The keys with which this run would take less memory. `budget`: what train.microbatch_tokens=auto means, if known;
    `checkpointed`: what train.activation_checkpointing=null does."""
    keys, train = [], config.train
    size, tokens = train.microbatch_size, train.microbatch_tokens
    tokens = budget or TRIED if isinstance(tokens, str) else tokens
    if tokens is not None or size is None or size > 1:
        drops = config.peft.name == "lora" and config.peft.lora_dropout > 0
        effect = "dropout then drops other elements: a resume needs resume_changes=allow" if drops else (
            "the same results up to rounding, unless the model has dropout"
        )  # fmt: skip
        keys.append(f"{_half_a_microbatch(size, tokens)} ({effect})")
    if not (checkpointed if train.activation_checkpointing is None else train.activation_checkpointing):
        keys.append("train.activation_checkpointing=true (does not change results, costs time)")
    if config.peft.name == "none":
        keys.append("peft=lora")
    elif config.model.dtype in ("auto", "float32"):
        keys.append("model.dtype=bfloat16, of the frozen base")
    keys.append(f"train.max_length below {train.max_length}")
    if config.online is not None:
        keys.append("online.sampler.batch_size and online.sampler.cache_tokens")
    return "; ".join([*keys, "or more processes that shard the model, launch/accelerate/fsdp2.yaml"])


def _half_a_microbatch(size: int | None, tokens: int | None) -> str:
    """Half of every bound, since either may be the one that was reached."""
    bounds = {"train.microbatch_tokens": tokens, "train.microbatch_size": size if tokens is not None else size or 2}
    return " ".join(f"{key}={max(1, bound // 2)}" for key, bound in bounds.items() if bound is not None)
