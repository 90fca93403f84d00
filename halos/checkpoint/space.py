"""Estimate how much disk space a run takes before its first step, so that it does not end on a full disk days later."""

from pathlib import Path

from torch import nn

from halos.checkpoint.manifest import human_size
from halos.distributed.parameters import num_elements

TOKEN = 150  # bytes of tokenizer.json for each token: 70 for SmolLM2's, 140 for Llama 3's
PARAMETER = 2048  # bytes of headers and settings for each trained tensor
REST = 2**18  # random numbers, configurations, metrics, manifest


def checkpoint_bytes(module: nn.Module, *, adapter: bool, optimizer: int, vocabulary: int) -> int:
    """Estimate the size of a checkpoint: weights, `optimizer` bytes of optimizer state, and small files.

    An adapter is saved alone; otherwise all weights are. So full fine-tuning in float32 with AdamW takes 12 bytes for each
    parameter, LoRA the same for each trained one.
    """
    trained = sum(parameter.requires_grad for parameter in module.parameters())
    return weight_bytes(module, adapter=adapter) + optimizer + vocabulary * TOKEN + trained * PARAMETER + REST


def weight_bytes(module: nn.Module, *, adapter: bool) -> int:
    """Return the size of all weights, or of an adapter's alone."""
    saved = [parameter for parameter in module.parameters() if parameter.requires_grad or not adapter]
    return sum(num_elements(parameter) * parameter.element_size() for parameter in saved)


def final_bytes(module: nn.Module, *, adapter_alone: bool, vocabulary: int) -> int:
    """Estimate the size of FINAL: all weights once, an adapter merged and by itself; or the adapter alone."""
    saved = [parameter for parameter in module.parameters() if parameter.requires_grad or not adapter_alone]
    return sum(num_elements(parameter) * parameter.element_size() for parameter in saved) + vocabulary * TOKEN + REST


def too_little(directory: Path, *, free: int, one: int, most: int, present: int, final: int) -> str | None:
    """Return a complaint if `free` bytes cannot hold FINAL and `most` checkpoints of size `one`, `present` of which exist."""
    needed = max(0, most - present) * one + final
    if needed <= free:
        return None
    return (
        f"{directory} has {human_size(free)} free, and this run needs about {human_size(needed)}: {most} checkpoints of"
        f" {human_size(one)} at once, one of them being written and {present} there already, and {human_size(final)} for FINAL."
        " Free some, set a lower checkpoint.keep_last or keep_best, or choose another output_root"
    )
